# Everything a newcomer needs; `make` alone prints this list.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RAY := $(VENV)/.installed-ray

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20

setup: $(STAMP) ## make the environment in .venv (or VENV=...) with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 with venv found; name one: make setup PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train both stages on the embedded toy world: pictures and a table in ./demo (11 minutes on 2 cores with bf16, more without)
	$(BIN)/python scripts/demo.py --output demo

$(RAY): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

test: $(RAY) ## run all tests, Ray's too (11 minutes on 2 cores)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

test-fast: $(STAMP) ## run the tests that take less than ten seconds each
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'not slow'

lint: $(STAMP) ## check the style
	$(BIN)/python -m ruff check .

clean: ## remove caches and build products; trained runs and the environment stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
