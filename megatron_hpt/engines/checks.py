"""Refuses settings that an engine would refuse or not do as asked, before it is started.

Imports no engine; the limits and their sources stand with each engine (`EngineKind.limits`).
"""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.engines.host import cache_room
from megatron_hpt.engines.interface import EngineKind
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape, read_config, shape_of_any


def check(config: Config, shape: ModelShape, on_gpus: bool) -> None:
    """Refuse an engine that cannot be started here, or given its weights; what settings alone decide has been checked.

    Raises:
        ConfigError: names the key and says what to do.
    """
    if not config.rollout.urls:
        check_started_engine(config, shape.head_dim, on_gpus)
        if not on_gpus:
            check_cache(config, shape)
    check_sleep(config, on_gpus)
    _check_engine_model(config, shape)


def check_sampling(config: Config) -> None:
    """Refuse sampling settings of training and evaluations that the engine does not follow.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    engine = engine_of(config)
    check_temperature("rollout.temperature", config.rollout.temperature, engine)
    if config.evaluation.held_out:
        check_temperature("evaluation.temperature", config.evaluation.temperature, engine)
    rollout = config.rollout
    if engine.limits.samples_are_one_request and not rollout.urls and rollout.samples_per_prompt > rollout.max_running:
        raise ConfigError(
            f"rollout.samples_per_prompt: given {rollout.samples_per_prompt}; {rollout.engine} decodes the samples of a prompt "
            f"at the same time, and refuses more than rollout.max_running={rollout.max_running}: raise that, or lower this"
        )


def check_temperature(key: str, given: float, engine: EngineKind) -> None:
    """Refuse a temperature at which the engine does not sample as asked: the trainer computes with the one that was given.

    Args:
        key: setting or option that messages name.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    limits, name = engine.limits, engine.name
    if given < limits.coldest:
        raise ConfigError(
            f"{key}: given {given:g}; below {limits.coldest:g} {name} samples at another temperature than it is asked for, "
            f"and its probabilities would not be the trainer's: at least {limits.coldest:g}"
        )
    if limits.hottest is not None and given > limits.hottest:
        raise ConfigError(f"{key}: given {given:g}; {name} refuses temperatures above {limits.hottest:g}")


def check_cache(config: Config, shape: ModelShape) -> None:
    """Refuse a KV cache of an engine on the host that does not hold one prompt with its response at their longest.

    Raises:
        ConfigError: says how large the cache has to be.
    """
    room, longest = cache_room(config, shape), config.max_sequence_length
    if room < longest:
        needed = -(-longest * config.rollout.kv_cache_gib // max(1, room))
        raise ConfigError(
            f"rollout.kv_cache_gib: given {config.rollout.kv_cache_gib}, which holds {room} tokens; a prompt with its response "
            f"may have {longest} (data.max_prompt_length + data.max_response_length): at least {needed}"
        )


def check_started_engine(config: Config, head_dim: int | None, on_gpus: bool) -> None:
    """Refuse an engine that cannot be started on this machine.

    Args:
        head_dim: size of the model's attention heads; None: not known.

    Raises:
        ConfigError: its environment is missing, or its attention, or it has no mode as fast as was asked for; says what to do.
    """
    interpreter(config)
    if config.rollout.seeded is False and not on_gpus:
        raise ConfigError(
            "rollout.seeded: given false; engines on a host are started in the mode that heeds seeds, and have no faster one: "
            "set rollout.seeded=true"
        )
    allowed = () if on_gpus else engine_of(config).host_head_dims
    if allowed and head_dim is not None and head_dim not in allowed:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: its attention on the host has no heads of {head_dim} "
            f"({config.model.path}/config.json); allowed: {', '.join(map(str, allowed))}, or another engine"
        )


def check_sleep(config: Config, on_gpus: bool) -> None:
    """Refuse engines that are to sleep on a host, where they keep their memory: vLLM's worker there ignores sleep
    (v1/worker/cpu_worker.py) and its configuration refuses it (config/model.py); SGLang's memory saver is a CUDA library.

    Raises:
        ConfigError: they are to sleep on a host.
    """
    if config.rollout.sleep and not on_gpus:
        raise ConfigError(
            f"rollout.sleep: {config.rollout.engine} gives memory back on GPUs only, and this machine has none; set "
            "rollout.sleep=false"
        )


def _check_engine_model(config: Config, shape: ModelShape) -> None:
    """Refuse a folder of the engine's own that is not the actor's model, or in whose form it cannot be sent weights."""
    if not config.rollout.model:
        return
    from megatron_hpt.transfer.quantize import PER_TENSOR  # these import torch
    from megatron_hpt.transfer.wire_format import fp8_format

    if fp8_format(read_config(config.rollout.model)) == PER_TENSOR and not engine_of(config).loads_fp8_per_tensor:
        raise ConfigError(
            f"rollout.model: {config.rollout.model} is an FP8 checkpoint with a scale for each tensor, which "
            f"{config.rollout.engine} replaces after loading by weights without a loader, so that it could not be sent others; "
            "give one with weight_block_size [128, 128], or another engine"
        )
    if shape_of_any(config.rollout.model, config.model.overrides) != shape:
        raise ConfigError(
            f"rollout.model: the model in {config.rollout.model} has another shape than that in {config.model.path}"
        )
