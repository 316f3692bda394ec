"""Scores of samples: the only place where an evaluation meets the reward registry."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby

from megatron_hpt.evaluation.samples import SampleRow
from megatron_hpt.rewards.math import last_boxed
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rewards.registry import lookup

LOST = "the grader crashed or took too long"


def check_grader(name: str) -> None:
    """Raises:
    ConfigError: no reward of that name.
    """
    lookup(name)


class Graders:
    """Grader processes by reward, started when they are first needed; a context manager."""

    def __init__(self, workers: int, deadline_s: float, started: dict[str, GraderPool] | None = None) -> None:
        """
        Args:
            workers: processes for each reward.
            deadline_s: seconds that the answers to one problem may take.
            started: pools that somebody else ends.
        """
        self._workers, self._deadline_s = workers, deadline_s
        self._pools = dict(started or {})
        self._stack = ExitStack()

    async def grade(self, rows: Sequence[SampleRow], grader: str) -> list[SampleRow]:
        """The samples with their scores, the answers to one problem together."""
        problems = [list(group) for _, group in groupby(rows, key=lambda row: row.problem_id)]
        scores = await asyncio.gather(
            *(self._pool(grader).grade([(row.response, row.ground_truth) for row in group]) for group in problems)
        )
        return [
            replace(row, score=score, ungraded_reason=LOST if score is None else None, grader=grader)
            for group, found in zip(problems, scores, strict=True)
            for row, score in zip(group, found, strict=True)
        ]

    def _pool(self, grader: str) -> GraderPool:
        if grader not in self._pools:
            self._pools[grader] = self._stack.enter_context(GraderPool(lookup(grader), self._workers, self._deadline_s))
        return self._pools[grader]

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def answer_of(response: str) -> str | None:
    """What maj@k counts: the content of the last box."""
    return last_boxed(response)
