# Every target builds its environment first, from a pinned set in constraints/; nothing outside the checkout is touched.
# .venv is constraints/tested.txt; the others stand beside it because what they hold cannot live in one with it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo
DOCS_STAMP := $(VENV)/.docs
# one environment for each group of clients that can live together, .venv-clients-%
CLIENTS := $(patsubst constraints/clients-%.txt,%,$(wildcard constraints/clients-*.txt))
DEEPSPEED := .venv-deepspeed
LOWEST := .venv-lowest
NEWEST := .venv-newest
WHEEL := .venv-wheel
RELEASE := .venv-release
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' lightning_plugins/_version.py)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
SUITE := -m pytest -n 2 --dist worksteal

.PHONY: help demo test torture mutants test-clients test-deepspeed test-lowest test-newest lint docs build release-check \
	bench peers clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(DEMO_STAMP)  ## train a network on handwritten digits, about half a minute on two cores
	$(BIN)/python examples/digits.py $(ARGS)

test: $(STAMP)  ## the test suite, with branch coverage
	$(BIN)/python $(SUITE) --cov --cov-report=term $(ARGS)

torture: $(STAMP)  ## a thousand kills, ten thousand damaged files and as many random runs, from a new seed (or SEED=...)
	TORTURE=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/resume tests/hostile $(ARGS)

mutants: $(STAMP)  ## small faults in the package, each against the tests of its line: ARGS="--number 400 --seed 1"
	$(BIN)/python $(SUITE) --cov --cov-context=test --cov-report= --junitxml .durations.xml
	$(BIN)/python -m tests.mutants $(ARGS)

test-clients: $(CLIENTS:%=test-clients-%)  ## the callbacks inside the software that people use them with; RECORD=1 keeps what ran

test-clients-%: .venv-clients-%/.installed
	.venv-clients-$*/bin/python -m pytest tests/clients/$* $(if $(RECORD),--record docs/compatibility/clients-$*.json) $(ARGS)

test-deepspeed: $(DEEPSPEED)/.installed  ## the callbacks under DeepSpeed's ZeRO, on two CPU processes
	$(DEEPSPEED)/bin/python -m pytest tests/deepspeed $(ARGS)

test-lowest: $(LOWEST)/.installed  ## the test suite with the oldest versions that the package declares
	$(LOWEST)/bin/python $(SUITE) $(ARGS)

test-newest: $(NEWEST)/.installed  ## the test suite with the newest releases there are today, pre-releases among them
	$(NEWEST)/bin/python $(SUITE) $(ARGS)

lint: $(STAMP)  ## formatting, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING = 1  # the pinned version is not that one
docs: $(DOCS_STAMP)  ## README, cards and API reference as a site, into site/, looked at in a browser if there is one
	$(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q docs/test_in_browser.py

build: $(STAMP)  ## the wheel and the source distribution, into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

release-check: lint test demo docs build $(RELEASE)/.installed  ## all that can be run of the checklist for a release
	$(RELEASE)/bin/python -m twine check --strict dist/lightning_plugins-$(VERSION)*
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(PIP_INSTALL) -c constraints/tested.txt dist/lightning_plugins-$(VERSION)-py3-none-any.whl
	cd $(WHEEL) && bin/python -c 'import lightning_plugins as p; [getattr(p, name) for name in p.__all__]'
	cd $(WHEEL) && bin/lightning-plugins schedule 'WarmupCosine(10)' --total 100
	@grep -q '^## \[$(VERSION)\] - ' CHANGELOG.md || { echo 'CHANGELOG.md has no dated section for $(VERSION).'; exit 1; }
	@if sed -n '/^## \[Unreleased\]/,/^## \[$(VERSION)\]/p' CHANGELOG.md | grep -q '^- '; \
	then echo 'Everything passed. It is no release yet: CHANGELOG.md has changes after $(VERSION).'; \
	else echo 'Everything passed. What is left: the tag v$(VERSION).'; fi

bench: $(STAMP)  ## speed and memory beside the libraries that are installed, as ratios
	$(BIN)/python -m benchmarks $(ARGS)

peers: $(STAMP)  ## install the libraries that bench compares with
	$(BIN)/python $(PIP_INSTALL) -c constraints/tested.txt -e '.[bench]'

clean:  ## remove what the other targets made
	rm -rf $(VENV) .venv-clients-* $(DEEPSPEED) $(LOWEST) $(NEWEST) $(RELEASE) $(WHEEL) dist runs site site-pictures \
		.coverage .coverage.* .durations.xml .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(DEMO_STAMP): pyproject.toml constraints/tested.txt
	@echo 'Installing what the demo needs into $(VENV): a few minutes, most of them for torch.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints/tested.txt -e '.[examples]'
	@echo 'Installed. Training: the first line of it takes some seconds.'
	@touch $@

$(STAMP): pyproject.toml constraints/tested.txt
	@echo 'Installing the tested versions into $(VENV): a few minutes, most of them for torch.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints/tested.txt -e '.[dev]'
	touch $(DEMO_STAMP) $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) -c constraints/tested.txt -e '.[docs]'
	touch $@

.PRECIOUS: .venv-clients-%/.installed
.venv-clients-%/.installed: pyproject.toml constraints/clients-%.txt
	$(PYTHON) -m venv .venv-clients-$*
	.venv-clients-$*/bin/python $(PIP_INSTALL) -r constraints/clients-$*.txt -e .
	touch $@

# Without its C++: on a CPU nothing of it is used. What it needs is installed first, as its setup asks for torch.
$(DEEPSPEED)/.installed: pyproject.toml constraints/deepspeed.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) -c constraints/deepspeed.txt -e . hypothesis pytest \
		einops hjson msgpack ninja psutil py-cpuinfo pydantic setuptools wheel
	DS_BUILD_OPS=0 $(DEEPSPEED)/bin/python $(PIP_INSTALL) -c constraints/deepspeed.txt --no-deps --no-build-isolation \
		deepspeed
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(PIP_INSTALL) -c constraints/lowest.txt -e '.[test]'
	touch $@

# Without a pin and without the upper bound: what comes is to be seen before it is admitted. Made anew for each run.
$(NEWEST)/.installed: FORCE
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) --no-deps -e .
	$(NEWEST)/bin/python constraints/newest.py > $(NEWEST)/newest.txt
	$(NEWEST)/bin/python $(PIP_INSTALL) --pre -r $(NEWEST)/newest.txt
	touch $@

$(RELEASE)/.installed: constraints/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python $(PIP_INSTALL) -r constraints/release.txt
	touch $@

FORCE:
