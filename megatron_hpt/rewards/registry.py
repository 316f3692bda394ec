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
"""Gives one answer its score, any finite number (1.0 is correct; pass@k and the curriculum count nothing else as solved).

`worker` makes every reward of the settings once, in the process from which graders are forked, and each grader calls it for one
answer at a time, in its main thread, under `reward.deadline_s` and `reward.memory_gib`. A reward may keep state and start
processes; they die with its grader. The same answer must get the same score, since another grader may see it next time.

It may raise anything. `Ungradable`, any other exception, a score that is not finite, and running out of time or memory or dying
leave the answer ungraded, with the cause in its `Grade`: it is counted (`rollout/ungraded_*`), left out of gate and loss, and
never taken for a 0. A reward that cannot work here at all (a package is missing, programs cannot be jailed) raises a
ConfigError when it is made, which ends the command before anything starts. `http` is no such function: see `http.RewardServer`.
"""


@dataclass(frozen=True)
class RewardRow:
    """A reward of this project: what it compares, and the function that makes it from the settings."""

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
"""Name → the rewards that run in grader processes. `http` is the one that does not."""


def build(name: str, settings: RewardConfig) -> Reward:
    """Make a reward that runs in a grader process; `worker` calls this.

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
    """Make a reward of a user's function of (response, ground_truth), which may also have parameters data_source and prompt."""
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
    """Make every reward that the settings name once, before anything starts, so that one that cannot run here is refused.

    Raises:
        ConfigError: names the setting and says what to change.
    """
    for name in settings.names:
        if name == "http":
            from megatron_hpt.rewards.http import RewardServer  # aiohttp, which grader processes do without

            RewardServer(settings)
        else:
            build(name, settings)
