# `make test` does everything on a fresh clone: it sets up .venv first, with Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv/bin/python
# Two processes, a file's tests in one of them; what takes the whole machine (real) runs alone.
UNIT := $(VENV) -m pytest -m "not real" -n 2 --dist loadfile

.PHONY: help setup test lint types unit real docs
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make or mend .venv, with the developers' tools
	@$(PYTHON) -m training.setup_venv --dev

test: setup  ## lint, types, and every test
	$(VENV) -m ruff check .
	$(VENV) -m mypy & types=$$!; $(UNIT) --durations=10 && $(VENV) -m pytest -m real --durations=10 && wait $$types

lint: setup  ## ruff
	$(VENV) -m ruff check .

types: setup  ## mypy
	$(VENV) -m mypy

unit: setup  ## the tests that take milliseconds
	$(UNIT)

real: setup  ## the whole command and DeepSpeed's launcher, on real input
	$(VENV) -m pytest -m real

docs: setup  ## regenerate the generated pages of docs/
	$(VENV) -m training.documentation
