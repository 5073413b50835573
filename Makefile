# Every target builds .venv first, from the pinned set in constraints.txt; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs

.PHONY: help demo test lint docs build bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(STAMP)  ## train a network on handwritten digits, about half a minute on two cores
	$(BIN)/python examples/digits.py $(ARGS)

test: $(STAMP)  ## the test suite, with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term -n 2 --dist worksteal $(ARGS)

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

bench: $(STAMP)  ## speed and memory beside other libraries, as ratios
	$(BIN)/python -m benchmarks $(ARGS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) dist runs site .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)
