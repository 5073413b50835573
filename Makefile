# Every target builds its environment first, from a pinned set; nothing outside the checkout is touched. .venv is
# constraints.txt; .venv-clients and .venv-lowest stand beside it because what they hold cannot live in one with it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs
CLIENTS := .venv-clients
LOWEST := .venv-lowest
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test torture test-clients test-lowest lint docs build bench peers clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(STAMP)  ## train a network on handwritten digits, about half a minute on two cores
	$(BIN)/python examples/digits.py $(ARGS)

test: $(STAMP)  ## the test suite, with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term -n 2 --dist worksteal $(ARGS)

torture: $(STAMP)  ## a thousand kills and ten thousand damaged files, from a new seed (or SEED=...)
	TORTURE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/resume tests/hostile $(ARGS)

test-clients: $(CLIENTS)/.installed  ## the callbacks inside pytorch-forecasting and darts
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

test-lowest: $(LOWEST)/.installed  ## the test suite with the oldest versions that the package declares
	$(LOWEST)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)  ## formatting, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING = 1  # the pinned version is not that one
docs: $(DOCS_STAMP)  ## README, cards and API reference as a site, into site/
	$(BIN)/mkdocs build --strict

build: $(STAMP)  ## the wheel and the source distribution, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

bench: $(STAMP)  ## speed and memory beside the libraries that are installed, as ratios
	$(BIN)/python -m benchmarks $(ARGS)

peers: $(STAMP)  ## install the libraries that bench compares with
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[bench]'

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(CLIENTS) $(LOWEST) dist runs site .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache \
		.ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

$(CLIENTS)/.installed: pyproject.toml constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python $(PIP_INSTALL) -c constraints-clients.txt -e . darts hypothesis pytest pytorch-forecasting
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) -c constraints-lowest.txt -e '.[test]'
	touch $@
