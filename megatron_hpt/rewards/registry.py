"""Rewards by name: what each compares, and how it is made from the settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from megatron_hpt.config import REWARDS as NAMES
from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import ConfigError, did_you_mean
from megatron_hpt.rewards import answers, code, gym, math, reference
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.settings.user_functions import import_function

Reward = Callable[[Answer], float]
"""Runs in a grader process. Raising leaves the answer ungraded."""


@dataclass(frozen=True)
class RewardRow:
    """A reward of this project."""

    about: str
    build: Callable[[RewardConfig], Reward]


def _as_is(reward: Reward) -> Callable[[RewardConfig], Reward]:
    return lambda settings: reward


LOCAL: dict[str, RewardRow] = {
    "math": RewardRow("the last box after the reasoning says the same as the ground truth", _as_is(math.reward)),
    "math_strict": RewardRow("likewise, and units, words and per cent are written alike", _as_is(math.strict)),
    "math_reference": RewardRow("the rule that the HPT paper reports with: version 6 of its code", _as_is(reference.reward)),
    "choice": RewardRow("the letter chosen, A to D", _as_is(answers.choice)),
    "exact": RewardRow("the final answer, character by character", _as_is(answers.exact)),
    "numeric": RewardRow("the last number of the final answer, within reward.tolerance", answers.numeric),
    "format": RewardRow("the response matches reward.pattern", answers.form),
    "reasoning_gym": RewardRow("the verifier of the task in reasoning-gym", gym.build),
    "code": RewardRow("the program in the response passes the tests, in a sandbox", code.build),
}
"""Those that run in grader processes; `http` is the one that does not."""


def build(name: str, settings: RewardConfig) -> Reward:
    """A reward that runs in a grader process.

    Raises:
        ConfigError: no such reward, or it cannot run here.
    """
    if ":" in name:
        return _of_user(import_function(name, "reward.name"))
    check_name(name)
    return LOCAL[name].build(settings)


def check_name(name: str) -> None:
    """Refuse a name that nothing has.

    Raises:
        ConfigError: says which there are.
    """
    if name not in NAMES and ":" not in name:
        raise ConfigError(f"reward.name: given {name!r}; allowed: {', '.join(NAMES)}{did_you_mean(name, NAMES)}")


def _of_user(function: Callable[..., float]) -> Reward:
    """The user's function of (response, ground_truth), which may also ask for data_source and prompt by name."""
    parameters = inspect.signature(function).parameters
    asked = [name for name in ("data_source", "prompt") if name in parameters]
    try:
        inspect.signature(function).bind("", "", **dict.fromkeys(asked, ""))
    except TypeError as error:
        name = f"{function.__module__}:{function.__qualname__}"
        raise ConfigError(f"reward.name: {name} cannot be called with (response, ground_truth): {error}") from None

    def grade(answer: Answer) -> float:
        return function(answer.response, answer.ground_truth, **{name: getattr(answer, name) for name in asked})

    return grade


def check(settings: RewardConfig) -> None:
    """Everything that the settings name can be made here.

    Raises:
        ConfigError: names the setting and says what to change.
    """
    for name in settings.names:
        if name == "http":
            from megatron_hpt.rewards.http import RewardServer  # aiohttp, which grader processes do without

            RewardServer(settings)
        else:
            build(name, settings)
