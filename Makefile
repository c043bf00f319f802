# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make their own virtual environment.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo_run
BIN := $(VENV)/bin
SOURCES := modest_align_kernels python benchmarks tests setup.py

.PHONY: demo test lint benchmark readme gpu-check

demo: $(VENV)/demo.installed
	$(BIN)/modest-align demo $(OUTPUT) $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

benchmark: $(VENV)/test.installed
	$(BIN)/python -m benchmarks $(ARGS)

# Everything that needs a GPU, in one command, offline, with the PyTorch and Triton that $(PYTHON) has: OUT gets the results.
gpu-check: OUT ?= benchmarks/results
gpu-check: export PYTHONPATH := .:python
gpu-check:
	mkdir -p $(OUT)
	$(PYTHON) -m pytest -q -m "gpu or not slow" tests/test_gpu.py tests/test_triton.py 2>&1 | tee $(OUT)/gpu-tests.log
	$(PYTHON) -m benchmarks --output $(OUT) 2>&1 | tee $(OUT)/gpu-benchmark.log

# README's generated blocks, from what `make demo` and `make benchmark` stored under benchmarks/results.
readme: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.readme

$(VENV)/demo.installed: EXTRAS := train,encoders
$(VENV)/test.installed: EXTRAS := test,encoders
$(VENV)/%.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
