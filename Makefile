PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint fix bench twelve clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)  ## train, judge, publish, serve and roll back four small tasks on the bundled base
	$(BIN)/foreword demo

test: $(STAMP)  ## the default tests
	$(BIN)/python -m pytest -m "not slow and not gpu and not vllm and not postgres and not browser"

test-all: $(STAMP)  ## everything but what needs a GPU
	$(BIN)/python -m pytest -m "not gpu and not vllm and not postgres and not browser"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the README's figures
	$(BIN)/python bench/startup.py --json bench/results/startup.json
	$(BIN)/python bench/training.py --json bench/results/training.json
	$(BIN)/python bench/engine.py --json bench/results/engine.json

twelve: $(STAMP)  ## the twelve shared tasks on base-3m
	$(BIN)/python examples/twelve_tasks/run.py --base ../shared/models/base-3m

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
