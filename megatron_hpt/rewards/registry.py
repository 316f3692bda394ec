"""Rewards by name. A reward is a function (response text, ground truth) → number that runs in a grader process."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards import math

Reward = Callable[[str, str], float]

REWARDS: dict[str, Reward] = {"math": math.grade}


def lookup(name: str) -> Reward:
    """The reward a recipe names.

    Raises:
        ConfigError: no such reward.
    """
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"reward.name: given {name!r}; allowed: {', '.join(REWARDS)}{hint}")
    return REWARDS[name]
