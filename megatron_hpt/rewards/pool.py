"""Graders in subprocesses with a hard deadline: a grader that hangs or crashes costs one answer, never the run.

The outcome is a number or None, "ungraded": it is counted and left out of the gate, never a silent 0.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import multiprocessing
import signal
from collections.abc import Sequence

from pebble import ProcessPool

from megatron_hpt.rewards.registry import Reward

logger = logging.getLogger(__name__)


def _start_grader() -> None:
    """Ctrl-C reaches the whole terminal group; the coordinator decides when its graders end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off; the pool has one
    importlib.import_module("math_verify")  # seconds on a cold disk, which no answer's deadline should pay for


def _grade_all(reward: Reward, answers: list[tuple[str, str]]) -> list[float]:
    return [float(reward(response, truth)) for response, truth in answers]


class GraderPool:
    """Subprocesses that grade; a context manager."""

    def __init__(self, reward: Reward, workers: int, deadline_s: float) -> None:
        self._reward, self._deadline_s = reward, deadline_s
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(max_workers=workers, context=context, initializer=_start_grader)

    async def grade(self, answers: Sequence[tuple[str, str]]) -> list[float | None]:
        """Grade (response, ground truth) pairs, in order; None where no grade could be had."""
        answers = list(answers)
        if not answers:
            return []
        grades = await self._attempt(answers)
        if grades is not None:
            return list(grades)
        if len(answers) == 1:
            return [None]
        # Somebody in this bunch hung or crashed: one by one, so that only the culprit stays ungraded.
        single = [await self._attempt([answer]) for answer in answers]
        return [None if one is None else one[0] for one in single]

    async def _attempt(self, answers: list[tuple[str, str]]) -> list[float] | None:
        future = self._pool.schedule(_grade_all, args=(self._reward, answers), timeout=self._deadline_s)
        try:
            return await asyncio.wrap_future(future)
        except Exception as error:  # whatever a reward raises, or how its process died: the answer is ungraded
            logger.warning("%d answers not graded together: %s: %s", len(answers), type(error).__name__, error)
            return None

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.stop()
        self._pool.join()
