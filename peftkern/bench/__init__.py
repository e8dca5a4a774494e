# SPDX-License-Identifier: Apache-2.0
"""``peftkern bench``: every op at the layer shapes of real models, against its peers and against the machine's limits.

cases.py       what is timed: op, shape, dtype; the suites and the sweeps
providers.py   who does the work: peftkern, plain torch, HF PEFT, bitsandbytes, torchao; each result is checked
method_providers.py   the same for the ops of single methods: a bank of adapters, DoRA, AdaLoRA, compression
measure.py     how it is timed: alternating order, cold buffers, quantiles; the machine's ceilings
report.py      the table and the JSON
plots.py       PNG files and one HTML page
"""
