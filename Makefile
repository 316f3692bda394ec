# make train [RECIPE=quickstart] [ARGS="trainer.steps=20"]   trains a recipe; the first call installs everything
# make test-fast                                             what needs no Megatron ranks, engines or servers: under 2 minutes
# make test                                                  what proves the product: at most 30 minutes on two cores
# make test-all                                              every test: also the twenty kills, full matrices, more of Slurm
# make test TESTS=tests/slurm                                of these, some; docs/testing.md says which promise each proves
# make sglang-env                                            the environment of rollout.engine=sglang, beside the first
# make nemo-env                                              the environment of megatron-hpt launch, beside the first
PYTHON ?= python3.11
RECIPE ?= quickstart
ARGS ?=
TESTS ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SGLANG := .venv-sglang
NEMO := .venv-nemo

.PHONY: train test test-fast test-all lint environments sglang-env nemo-env

# An environment: where, and its pins.
define install
$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(2)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endef

train: $(READY)
	$(BIN)/megatron-hpt train recipes/$(RECIPE).py $(ARGS)

# Two processes, each with engines, Slurm or ranks of its own (tests/plugin.py); tests without SGLang's, NeMo-Run's or Slurm's
# parts say so where these cannot be had.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --durations 20

test: lint
	$(PYTEST) -m "not thorough" $(TESTS)

test-fast: lint
	$(PYTEST) -m "not slow and not thorough" $(TESTS)

test-all: lint environments
	$(PYTEST) $(TESTS)

environments: $(READY) sglang-env nemo-env

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Everything is pinned and installed with --no-deps: a resolver would add CUDA builds of torch's companions.
$(READY): requirements/host.txt setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=/path/to/python3.11"; exit 1; }
	$(call install,$(VENV),requirements/host.txt)
	@$(BIN)/python -c 'import torch' || { echo "torch was installed as a CUDA build: point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL) and run make again"; exit 1; }
	touch $(READY)

sglang-env: $(SGLANG)/.ready

# --no-deps: SGLang's metadata asks for CUDA packages.
$(SGLANG)/.ready: requirements/sglang.txt setup.py
	$(call install,$(SGLANG),requirements/sglang.txt)
	touch $(SGLANG)/.ready

nemo-env: $(NEMO)/.ready

# --no-deps: leptonai's metadata asks for ray (240 MB), which nothing here imports.
$(NEMO)/.ready: requirements/nemo.txt setup.py
	$(call install,$(NEMO),requirements/nemo.txt)
	touch $(NEMO)/.ready
