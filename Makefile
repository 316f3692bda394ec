# make train [RECIPE=quickstart] [ARGS="trainer.steps=20"]   trains a recipe; the first call installs everything
# make test                                                  all tests; SGLang's, NeMo-Run's and Slurm's where these can be had, else it says why not
# make test-slurm                                            of these, a real Slurm of emulated nodes (root; installs Debian packages)
# make test-fast                                             without Megatron ranks and engines
# make sglang-env                                            the environment of rollout.engine=sglang, beside the first
# make nemo-env                                              the environment of megatron-hpt launch, beside the first
PYTHON ?= python3.11
RECIPE ?= quickstart
ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SGLANG := .venv-sglang
NEMO := .venv-nemo

.PHONY: train test test-fast test-slurm lint sglang-env nemo-env

# An environment: where, and its pins.
define install
$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(2)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endef

train: $(READY)
	$(BIN)/megatron-hpt train recipes/$(RECIPE).py $(ARGS)

test: lint
	$(BIN)/python -m pytest

test-slurm: $(READY)
	$(BIN)/python -m pytest tests/slurm

test-fast: lint
	$(BIN)/python -m pytest -m "not slow and not end_to_end and not slurm"

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
