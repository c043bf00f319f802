# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make their own virtual environment.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo_run
BIN := $(VENV)/bin
SOURCES := modest_align_kernels python benchmarks tests tools setup.py
CPP_SOURCES = $(shell find csrc tests/ptx_simulator tests/arm_driver.cpp -name '*.[ch]*')

.PHONY: demo test test-integrations lint benchmark readme gpu-check

demo: $(VENV)/demo.installed
	$(BIN)/modest-align demo $(OUTPUT) $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(ARGS)

test-integrations: $(VENV)/test.installed
	$(BIN)/python -m pytest -m integrations tests/integrations $(ARGS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

benchmark: $(VENV)/test.installed
	$(BIN)/python -m benchmarks $(ARGS)

# What needs a GPU, in three commands of at most eight minutes each, offline, with what $(PYTHON) has. OUT gets the
# results, and with them a part goes on that was cut off. Without nvcc, pybind11, ninja or CUTLASS's headers native is
# missing, without ncu or compute-sanitizer what they do.
gpu-check: PART ?= 1 2 3
gpu-check: OUT ?= gpu_check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(PART) --out $(OUT) $(ARGS)

# README's generated blocks, from what `make demo` and `make benchmark` stored under benchmarks/results.
readme: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.readme

$(VENV)/demo.installed: EXTRAS := train,encoders
$(VENV)/test.installed: EXTRAS := test,encoders,integrations
$(VENV)/%.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
