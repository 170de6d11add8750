# Everything runs in a virtual environment of its own, made by the first command that needs it.
# Another interpreter: make PYTHON=python3.12 ... ; another environment: make VENV=/some/where ...

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
ENVIRONMENT := $(VENV)/.stamp-python
INSTALLED := $(VENV)/.stamp-test
LINTERS := $(VENV)/.stamp-lint

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-slow test-all lint format typecheck bench clean

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the environment and install the package into it, editable

demo: $(INSTALLED) ## Show robust overfitting and what stops it, on a small data set; figures go to runs/robust_overfitting
	$(BIN)/python examples/robust_overfitting.py

test: $(INSTALLED) ## Run the tests, without those that take minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(INSTALLED) ## Run the tests that take minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

test-all: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(LINTERS) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(LINTERS) ## Bring style and format in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(INSTALLED) $(LINTERS) ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED) ## Measure speed; results go to benchmarks/results
	$(BIN)/python benchmarks/speed.py

clean: ## Remove caches and what was built; environments and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.*/*" -prune -exec rm -rf {} +

$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ntkadv needs Python 3.11 or newer, but '$(PYTHON)' is `$(PYTHON) --version 2>&1`: name one by make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# neural-tangents asks for TensorFlow, which nothing here needs; so it goes in without its dependencies.
$(INSTALLED): $(ENVIRONMENT) setup.cfg pyproject.toml
	$(PIP) install --editable ".[test]"
	$(PIP) install --no-deps neural-tangents==0.6.5
	@touch $@

# The extra brings pyright's own Node.js from the package index, instead of a download at its first run.
$(LINTERS): $(ENVIRONMENT) setup.cfg pyproject.toml
	$(PIP) install --editable ".[lint]" "pyright[nodejs]"
	@touch $@
