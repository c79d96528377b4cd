# `make` is the only interface: every target sets up .venv first if it has to.
.DEFAULT_GOAL := help
.PHONY: help demo demo-short test test-slow bench lint format docs gpu-test clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= out

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## fit, score and compare on handwritten digits; open out/index.html
	$(BIN)/python examples/digits.py --out $(OUT)

demo-short: $(READY)  ## the same with a few training steps
	$(BIN)/python examples/digits.py --out $(OUT)/short --short

test: $(READY)  ## the tests, some minutes on two cores
	$(BIN)/python -m pytest -m 'not slow' --numprocesses auto --dist worksteal

test-slow: $(READY)  ## the tests that take longer than half a minute each
	$(BIN)/python -m pytest -m slow

bench: $(READY)  ## times beside other libraries, some forty minutes; open out/benchmarks/cpu.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks --out $(OUT)/benchmarks

gpu-test: $(READY)  ## the tests on every CUDA device that is there
	$(BIN)/python -m pytest -m 'not slow' -k cuda

lint: $(READY)  ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## format the code, sort the imports
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

docs: $(READY)  ## the API pages under out/docs
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m pdoc --math --docformat google --output-directory $(OUT)/docs pyro_lvm

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
