"""Scores of samples. This is the only place where an evaluation meets the reward registry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.evaluation.samples import SampleRow
from megatron_hpt.rewards import reference
from megatron_hpt.rewards.answers import chosen, final
from megatron_hpt.rewards.boxes import boxed_answer
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rewards.registry import check, check_name
from megatron_hpt.settings.sections import validated_section
from megatron_hpt.settings.values import NotAValue, given_value

_LABELLED = {"name", "by_source"}


def label(settings: RewardConfig) -> str:
    """Return what samples record of their grader: the reward's name, or JSON where there is more than one name."""
    if isinstance(settings.name, str) and not settings.by_source:
        return settings.name
    return json.dumps({"name": settings.name, "by_source": settings.by_source})


def settings_of(grader: str, base: RewardConfig) -> RewardConfig:
    """Return the settings for a label, or for what a user writes: a reward, or a sum such as {math: 0.9, format: 0.1}.

    Everything but the rewards' names is taken from `base`.

    Raises:
        ConfigError: no reward of that name, or one that lacks a setting.
    """
    try:
        given = given_value(grader) if grader.startswith("{") else grader
    except NotAValue as error:
        raise ConfigError(f"grader {error}; expected a reward, or a sum such as {{math: 0.9, format: 0.1}}") from None
    if isinstance(given, str):
        check_name(given)
    names = given if isinstance(given, dict) and given.keys() == _LABELLED else {"name": given, "by_source": {}}
    return validated_section(RewardConfig, {**base.model_dump(), **names}, f"grader {grader}")


def checked_grader(grader: str, base: RewardConfig) -> str:
    """Return the label of what a user writes, and see that it can run here.

    Raises:
        ConfigError: no reward of that name, or it cannot run here.
    """
    settings = settings_of(grader, base)
    check(settings)
    return label(settings)


class Graders:
    """Grader processes by label, started when they are first needed; a context manager."""

    def __init__(self, settings: RewardConfig, started: Mapping[str, GraderPool] | None = None) -> None:
        """
        Args:
            settings: for every grader, but for the rewards' names.
            started: pools that the caller has started and will end.
        """
        self._settings = settings
        self._pools = dict(started or {})
        self._stack = ExitStack()

    async def grade(self, rows: Sequence[SampleRow], grader: str) -> list[SampleRow]:
        """Return the samples with their scores. The answers to one problem are graded together."""
        problems = [list(group) for _, group in groupby(rows, key=lambda row: row.problem_id)]
        grades = await asyncio.gather(
            *(self._pool(grader).grade([_answer(row) for row in group]) for group in problems),
        )
        return [
            replace(row, answer=answer_of(row.response, grader), score=grade.score, ungraded_reason=grade.reason, grader=grader)
            for group, found in zip(problems, grades, strict=True)
            for row, grade in zip(group, found, strict=True)
        ]

    def _pool(self, grader: str) -> GraderPool:
        if grader not in self._pools:
            self._pools[grader] = self._stack.enter_context(GraderPool(settings_of(grader, self._settings)))
        return self._pools[grader]

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _answer(row: SampleRow) -> Answer:
    return Answer(row.response, row.ground_truth, row.prompt, row.data_source)


_ANSWERS = {
    "math_reference": reference.last_boxed,
    **{"choice": chosen, "exact": final, "numeric": final, "reasoning_gym": final},
}
"""Grader → how it reads the answer, of those that do not take the last box behind the reasoning."""


def answer_of(response: str, grader: str) -> str | None:
    """Return the answer as the grader reads it, which maj@k counts; None if there is none."""
    return _ANSWERS.get(grader, boxed_answer)(response)
