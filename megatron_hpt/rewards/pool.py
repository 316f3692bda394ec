"""All graders of a run: the pool chooses the rewards of each answer, has them computed where they run, and adds them up."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.grades import Answer, Grade, as_answers, graded
from megatron_hpt.rewards.http import RewardServer
from megatron_hpt.rewards.processes import GraderProcesses

logger = logging.getLogger(__name__)


class GraderPool:
    """Grades answers in subprocesses, or by a server; a context manager. Works from any thread and event loop."""

    def __init__(self, settings: RewardConfig) -> None:
        """
        Raises:
            ConfigError: a reward cannot be made here.
        """
        self._default, self._by_source = weights(settings.name), {s: weights(c) for s, c in settings.by_source.items()}
        self._server = RewardServer(settings) if "http" in settings.names else None
        self._processes = GraderProcesses(settings) if set(settings.names) - {"http"} else None
        self.ungraded: Counter[str] = Counter()
        """How many answers got no grade so far, by cause."""

    async def grade(self, answers: Sequence[Answer | tuple[str, str]]) -> list[Grade]:
        """Grade answers, or (response, ground truth) pairs, in order. Never raises for an answer: see `Grade.cause`."""
        answers = as_answers(answers)
        terms = [self._by_source.get(answer.data_source, self._default) for answer in answers]
        jobs = [(name, place) for place, term in enumerate(terms) for name in term]
        found = await self._run([(name, answers[place]) for name, place in jobs])
        by_answer: list[dict[str, Grade]] = [{} for _ in answers]
        for (name, place), grade in zip(jobs, found, strict=True):
            by_answer[place][name] = grade
        grades = [weighted(term, parts) for term, parts in zip(terms, by_answer, strict=True)]
        self._count(answers, grades)
        return grades

    async def _run(self, jobs: Sequence[tuple[str, Answer]]) -> list[Grade]:
        remote = [index for index, (name, _) in enumerate(jobs) if name == "http"]
        local = [index for index, (name, _) in enumerate(jobs) if name != "http"]
        futures = self._processes.submit(jobs[index] for index in local) if local else []
        asked = self._server.grade([jobs[index][1] for index in remote]) if remote else _none()
        by_server, *by_processes = await asyncio.gather(asked, *map(asyncio.wrap_future, futures))
        found = dict(zip(remote, by_server, strict=True)) | dict(zip(local, by_processes, strict=True))
        return [found[index] for index in range(len(jobs))]

    def _count(self, answers: Sequence[Answer], grades: Sequence[Grade]) -> None:
        lost = [(answer, grade) for answer, grade in zip(answers, grades, strict=True) if grade.cause]
        self.ungraded.update(str(grade.cause) for _, grade in lost)
        for answer, grade in lost[:3]:
            logger.warning("ungraded (%s): %s; the answer ends with %r", grade.cause, grade.detail, answer.response[-100:])
        if len(lost) > 3:
            logger.warning("and %d more answers of these %d", len(lost) - 3, len(grades))

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._processes:
            self._processes.close()


async def _none() -> list[Grade]:
    return []


def weights(choice: str | Mapping[str, float]) -> Mapping[str, float]:
    """Write a choice of rewards as a weighted sum."""
    return {choice: 1.0} if isinstance(choice, str) else choice


def weighted(term: Mapping[str, float], parts: Mapping[str, Grade]) -> Grade:
    """Add grades by their weights; ungraded if one of them is. The sum is rounded once, so that 0.7 + 0.2 + 0.1 is 1."""
    for part in parts.values():
        if part.score is None:
            return part
    return graded(math.fsum(weight * (parts[name].score or 0.0) for name, weight in term.items()))
