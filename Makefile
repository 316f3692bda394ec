# make train [RECIPE=quickstart] [ARGS="trainer.steps=20"]   trains a recipe; the first call installs everything
# make test-fast                                             what needs no Megatron ranks, engines or servers: under 2 minutes
# make test                                                  what proves the product: at most 30 minutes on two cores
# make test-all                                              every test: also the twenty kills, full matrices, more of Slurm
# make test TESTS=tests/slurm                                of these, some; docs/testing.md says which promise each proves
# make sglang-env                                            the environment of rollout.engine=sglang, beside the first
# make nemo-env                                              the environment of megatron-hpt launch, beside the first
# make gpu-rehearsal                                         the GPU path without a GPU (docs/gpu.md); a part of make test-all
PYTHON ?= python3.11
PYTHON312 ?= python3.12
RECIPE ?= quickstart
ARGS ?=
TESTS ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SGLANG := .venv-sglang
NEMO := .venv-nemo
GPU := .venv-gpu

.PHONY: train test test-fast test-all gpu-rehearsal lint environments sglang-env nemo-env gpu-env

# An environment: where, its pins, and its Python. --clear would empty what a link leads to.
define install
	@[ ! -L $(1) ] || { echo "$(1) is a link, and its environment is older than $(2): remove the link, or run make where it leads"; exit 1; }
$(3) -m venv --clear $(1)
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

test-all: lint environments gpu-rehearsal
	$(PYTEST) $(TESTS)

# CUDA builds over a stand-in for the device: the tests that say they run there too.
GPU_TESTS ?= tests/gpu tests/actor
gpu-rehearsal: gpu-env
	CUDA_VISIBLE_DEVICES= $(GPU)/bin/python -m pytest --durations 20 -m "gpu and not thorough" $(GPU_TESTS)

environments: $(READY) sglang-env nemo-env

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Everything is pinned and installed with --no-deps: a resolver would add CUDA builds of torch's companions.
$(READY): requirements/host.txt setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=/path/to/python3.11"; exit 1; }
	$(call install,$(VENV),requirements/host.txt,$(PYTHON))
	@$(BIN)/python -c 'import torch' || { echo "torch was installed as a CUDA build: point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL) and run make again"; exit 1; }
	touch $(READY)

sglang-env: $(SGLANG)/.ready

# --no-deps: SGLang's metadata asks for CUDA packages.
$(SGLANG)/.ready: requirements/sglang.txt setup.py
	$(call install,$(SGLANG),requirements/sglang.txt,$(PYTHON))
	touch $(SGLANG)/.ready

nemo-env: $(NEMO)/.ready

# --no-deps: leptonai's metadata asks for ray (240 MB), which nothing here imports.
$(NEMO)/.ready: requirements/nemo.txt setup.py
	$(call install,$(NEMO),requirements/nemo.txt,$(PYTHON))
	touch $(NEMO)/.ready

gpu-env: $(GPU)/.ready

# 5.4 GB, and a compiler: nothing of it is run by a GPU.
$(GPU)/.ready: requirements/gpu_rehearsal.txt setup.py $(wildcard tests/fake_gpu/*)
	@command -v $(PYTHON312) >/dev/null || { echo "$(PYTHON312) not found: install Python 3.12, or set PYTHON312=/path/to/python3.12"; exit 1; }
	$(call install,$(GPU),requirements/gpu_rehearsal.txt,$(PYTHON312))
	$(GPU)/bin/python tests/fake_gpu/build.py
	touch $(GPU)/.ready
