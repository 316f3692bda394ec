"""Everything that can be refused is refused here, before a process starts: a list of calls. Each rule lives with what it is
about; those that settings alone decide are validators in config.py, or called in launch/settings_checks.py."""

from __future__ import annotations

import torch

from megatron_hpt.actor.model import kernels, precision
from megatron_hpt.actor.model.logprob_choice import check_kernel
from megatron_hpt.config import Config
from megatron_hpt.data.prompts import load_prompts
from megatron_hpt.data.source import held_out_limits
from megatron_hpt.engines import checks as engine_checks
from megatron_hpt.evaluation import selection
from megatron_hpt.launch import settings_checks
from megatron_hpt.launch.training_data import TrainingDataReport, check_training_data
from megatron_hpt.models.checks import check_reference_model, check_vocabulary, check_weights
from megatron_hpt.models.hf_config import ModelShape, run_shape
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective import algorithms
from megatron_hpt.plan import layout
from megatron_hpt.plan.fit import check_memory
from megatron_hpt.rewards import registry
from megatron_hpt.transfer.transports import check_transport


def check(config: Config) -> TrainingDataReport:
    """Refuse what cannot run on this machine: settings, rewards, models, layouts, engine, evaluations, data.

    Called by `train` before it makes a run's folder, and by ``megatron-hpt check``.

    Returns:
        What was found in the training data.

    Raises:
        ConfigError, ModelError, DataError: with the key or file, what was given and what is allowed.
    """
    settings_checks.check(config)
    registry.check(config.reward)
    shape = _check_actor(config)
    engine_checks.check(config, shape, torch.cuda.is_available())
    check_transport(config.transfer.transport)
    if config.transfer.shares_gpus:
        check_memory(config, shape, torch.cuda.get_device_properties(0).total_memory)
    selection.check_selection(config)
    return _check_data(config, shape)


def check_without_engines(config: Config) -> None:
    """Refuse what the trainer cannot run on this machine; called for a run that trains a ledger (``train --from-ledger``).

    Raises:
        ConfigError, ModelError: as `check`.
    """
    settings_checks.check(config)
    _check_actor(config)


def _check_actor(config: Config) -> ModelShape:
    """Look at the model and at what the trainer computes it with; return its shape."""
    shape = run_shape(config)
    check_weights(config.model.path, shape)
    check_reference_model(config, shape)
    layout.check_layout(config, shape)
    precision.check_fp8(config.actor.fp8, config.model.dtype, precision.this_machine())
    precision.check_bf16_layers(config.actor.fp8, config.actor.bf16_layers, shape.layers)
    check_kernel(config.actor.logprob_kernel)
    kernels.check(config, shape)
    layout.check_lengths(config, shape)
    return shape


def _check_data(config: Config, shape: ModelShape) -> TrainingDataReport:
    """Read every row of training and evaluation data; those that are taken first are tokenised too."""
    tokenizer = load_tokenizer(config)
    check_vocabulary(config, len(tokenizer), shape)
    limits = held_out_limits(config)
    held_out = {name: load_prompts(paths, tokenizer, limits) for name, paths in config.evaluation.held_out.items()}
    selection.check_validation(config, held_out)
    sources = {prompt.data_source for prompts in held_out.values() for prompt in prompts}
    return check_training_data(config, tokenizer, algorithms.of_run(config).gate, sources)
