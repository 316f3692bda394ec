"""Rewards by name. A reward is a function (response text, ground truth) → number that runs in a grader process."""

from __future__ import annotations

from collections.abc import Callable

from megatron_hpt.errors import ConfigError, did_you_mean
from megatron_hpt.rewards import math

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {"math": math.grade}


def lookup(name: str) -> Reward:
    """The reward a recipe names.

    Raises:
        ConfigError: no such reward.
    """
    if name not in REWARDS:
        raise ConfigError(f"reward.name: given {name!r}; allowed: {', '.join(REWARDS)}{did_you_mean(name, REWARDS)}")
    return REWARDS[name]
