# `make test` does everything on a fresh clone: it sets up .venv first, with Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv/bin/python
# Two processes, a file's tests in one of them; what is timed runs alone.
TWO := -n 2 --dist loadfile --durations=5
UNIT := $(VENV) -m pytest -m "not real" $(TWO)
REAL := $(VENV) -m pytest -m "real and not alone" $(TWO)
ALONE := $(VENV) -m pytest -m alone

.PHONY: help setup test lint types unit real docs torture
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make or mend .venv, with the developers' tools
	@$(PYTHON) -m training.setup_venv --dev

test: setup  ## lint, types, and every test
	$(VENV) -m ruff check .
	$(VENV) -m mypy & types=$$!; $(UNIT) && $(REAL) && $(ALONE) && wait $$types

lint: setup  ## ruff
	$(VENV) -m ruff check .

types: setup  ## mypy
	$(VENV) -m mypy

unit: setup  ## the tests that take milliseconds
	$(UNIT)

real: setup  ## the whole command and DeepSpeed's launcher, on real input
	$(REAL) && $(ALONE)

docs: setup  ## regenerate the generated pages of docs/
	$(VENV) -m training.documentation

torture: setup  ## every row of docs/reliability.md at its full count (an hour); figures go to benchmarks/results
	ELITE_TORTURE=long $(VENV) -m pytest tests/torture -p no:xdist --durations=10
