"""Refuses settings that an engine would refuse or not do as asked, before it is started.

Imports no engine; the limits and their sources stand with each engine (`EngineKind.limits`).
"""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.engines.host import cache_room
from megatron_hpt.engines.interface import EngineKind
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape


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
