# Everything a developer runs. A bare `make` lists it.
#   PYTHON=python3.12      another interpreter            ARGS="..."      more arguments for the command of the target
#   PIP_ARGS="..."         more arguments for pip         WORKERS=4       test processes
PYTHON  ?= python3.11
VENV    ?= .venv
WORKERS ?= 2

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.lrcompile-installed
PIP     := $(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS)

# One thread a process: WORKERS processes share the cores, and sums then add up in one order.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow poison lint types packaging golden check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# torch first and alone: whatever comes after finds it there and cannot pull in another build of it.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the PATH; name another one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

setup: $(STAMP) ## make .venv and install everything (the others do it when needed)

demo: setup ## the main job: adapt, train, merge, quantize, export and verify a real model
	$(BIN)/lrcompile demo $(ARGS)

test: setup ## the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

slow: setup ## the slow tests
	$(PYTEST) -m slow --ignore tests/test_packaging.py $(ARGS)

# MALLOC_PERTURB_ fills what malloc returns with 0x7f bytes (glibc only), so whoever reads uninitialised memory meets 3e38 or NaN.
# It costs about 40 % of the time, hence its own target.
poison: setup ## the tests again, with uninitialised memory full of huge numbers
	MALLOC_PERTURB_=128 $(PYTEST) -m "not slow" $(ARGS)

lint: setup ## ruff
	$(BIN)/ruff check

types: setup ## mypy, on the package and the tests
	$(BIN)/mypy

packaging: setup ## the packaging tests: wheel through sdist, names, links, imports
	$(PYTEST) tests/test_packaging.py $(ARGS)

# Compiled packages take a minute more: `make slow` has them.
golden: setup ## check the stored goldens, in ONNX Runtime too
	$(BIN)/lrcompile golden check golden/ --forms merged,onnx,onnx-inline,onnx-inputs,onnx-nf4 $(ARGS)

check: lint types packaging ## lint, types and packaging

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
