# SPDX-License-Identifier: Apache-2.0
"""`python -m peftkern.finetune ...` is `peftkern finetune ...`."""

import argparse
import sys

from . import add_arguments, main

parser = argparse.ArgumentParser(prog="peftkern finetune")
add_arguments(parser)
sys.exit(main(parser.parse_args()))
