# Two commands matter: `make compare` and `make test`. Both set up what they need, once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
JOBS   ?= auto

.PHONY: compare test test-slow lint types format docs bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compare: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[compare]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.compare

compare: $(VENV)/.compare  ## compare four attention layers on scikit-learn's digits
	$(BIN)/heed compare classify --methods softmax,neighborhood,hilo,halo --seeds 3 --jobs 2 --out runs/digits

test: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
