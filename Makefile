# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo_run
BIN := $(VENV)/bin
SOURCES := modest_align_kernels python benchmarks tests

.PHONY: demo test lint benchmark readme

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

# README's generated blocks, from what `make demo` and `make benchmark` stored under benchmarks/results.
readme: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.readme

$(VENV)/demo.installed: EXTRAS := train,encoders
$(VENV)/test.installed: EXTRAS := test,encoders
$(VENV)/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
