"""The verifiers of reasoning-gym, one for each of its tasks; the package is imported when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards.answers import final
from megatron_hpt.rewards.grades import Answer, Ungradable

_PREFIX = "reasoning_gym/"


def build(settings: RewardConfig) -> Callable[[Answer], float]:
    """Make the reward that is the task's own score of the final answer, from 0 to 1.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"reward reasoning_gym: the package is missing ({error}): pip install reasoning_gym") from None

    def grade(answer: Answer) -> float:
        entry = _entry(answer)
        task = (entry.get("metadata") or {}).get("source_dataset") or answer.data_source.removeprefix(_PREFIX)
        try:
            score = reasoning_gym.get_score_answer_fn(task)
        except ValueError:
            raise Ungradable(
                f"{task!r} is no task of reasoning-gym; it is metadata.source_dataset of the entry, or the data_source"
            ) from None
        return float(score(final(answer.response), entry))

    return grade


def _entry(answer: Answer) -> dict[str, Any]:
    """Return the task's entry: the ground truth is an entry as JSON, or else only the entry's answer."""
    try:
        entry = json.loads(answer.ground_truth)
    except ValueError:
        entry = None
    if isinstance(entry, dict) and "answer" in entry:
        return entry
    return {"question": answer.prompt, "answer": answer.ground_truth, "metadata": {}}
