# Everything starts from a machine with Python 3.11 and make: `make demo`, `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/sh

.PHONY: demo test install lint types proto-check unit format proto clean help

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: install  ## a federation of one server and three clients on this machine, with a table and plots at the end
	$(BIN)/share-sim run quickstart --out runs/quickstart

test: install lint types proto-check unit  ## everything a change must pass

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "fedshare needs Python 3.11 or newer: set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lint: install  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## strict typing
	$(BIN)/mypy

proto-check: install  ## the committed stubs are what the .proto files give
	$(BIN)/python -m pytest -q tests/proto

# A file stays on one worker, so what its tests share is made once; files are taken in the order of tests/conftest.py.
unit: install  ## all other tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests --ignore=tests/proto

format: install  ## rewrite the code in its style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: install  ## regenerate the stubs
	PYTHON=$(abspath $(BIN)/python) proto/generate.sh

clean:  ## remove what was built
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
