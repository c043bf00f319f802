# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make their own virtual environment.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo_run
BIN := $(VENV)/bin
SOURCES := modest_align_kernels python benchmarks tests tools setup.py
CPP_SOURCES = $(shell find csrc tests/ptx_simulator -name '*.[ch]*')

.PHONY: demo test lint benchmark readme gpu-check

demo: $(VENV)/demo.installed
	$(BIN)/modest-align demo $(OUTPUT) $(ARGS)

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

benchmark: $(VENV)/test.installed
	$(BIN)/python -m benchmarks $(ARGS)

# Everything that needs a GPU, in one command, offline, with what $(PYTHON) has: OUT gets the results. Without nvcc,
# pybind11, ninja or CUTLASS's headers the compiled kernels are left out, without compute-sanitizer its checks.
gpu-check: OUT ?= benchmarks/results
gpu-check: export PYTHONPATH := .:python:$(PYTHONPATH)
gpu-check: SANITIZED := "gpu and not slow" tests/test_gpu.py -k "error_budget and float16 and not bfloat16 and odd-sizes"
gpu-check:
	mkdir -p $(OUT)
	-MODEST_ALIGN_CUDA=1 $(PYTHON) setup.py build_ext --inplace > $(OUT)/gpu-build.log 2>&1
	$(PYTHON) -m pytest -q -m "gpu or not slow" tests/test_gpu.py tests/test_triton.py tests/test_cuda_compile.py 2>&1 | tee $(OUT)/gpu-tests.log
	! command -v compute-sanitizer || for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -m $(SANITIZED) || exit 1; \
	done 2>&1 | tee $(OUT)/gpu-sanitizer.log
	$(PYTHON) -m benchmarks --budget 240 --output $(OUT) 2>&1 | tee $(OUT)/gpu-benchmark.log

# README's generated blocks, from what `make demo` and `make benchmark` stored under benchmarks/results.
readme: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.readme

$(VENV)/demo.installed: EXTRAS := train,encoders
$(VENV)/test.installed: EXTRAS := test,encoders
$(VENV)/%.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
