# SPDX-License-Identifier: Apache-2.0
"""The command line: ``peftkern info``, ``peftkern bench``, ``peftkern finetune``."""

from __future__ import annotations

import argparse
import sys


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peftkern", description="Kernels for parameter-efficient fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built and what this machine runs")

    from .bench import cli as bench
    from .finetune import cli as finetune

    bench.add_arguments(
        commands.add_parser("bench", help="time the kernels against their peers and the machine's limits")
    )
    finetune.add_arguments(commands.add_parser("finetune", help="fine-tune a causal language model with LoRA or QLoRA"))
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.command == "finetune":
        from .finetune import cli as finetune

        return finetune.main(args)
    if args.command == "bench":
        from .bench import cli as bench

        return bench.main(args)

    from .info import info

    for name, value in info().items():
        print(f"{name + ':':14}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
