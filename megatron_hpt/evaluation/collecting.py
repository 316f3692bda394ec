"""Filling the folder of an evaluation: missing samples are drawn, and every set is graded and written once it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hpt.engines.types import Sampler
from megatron_hpt.evaluation.grading import Graders
from megatron_hpt.evaluation.journal import Journal
from megatron_hpt.evaluation.problems import EvaluationProblem
from megatron_hpt.evaluation.samples import Evaluation, SampleRow, count_samples, read_samples, samples_file, write_samples
from megatron_hpt.evaluation.sampling import Wanted, draw, wanted


@dataclass(frozen=True)
class SampleSource:
    """Who answers, and how much at once."""

    engine: Sampler
    tokenizer: Any
    at_once: int
    """How many requests are under way at the same time."""


class Collection:
    """The sets of one evaluation that are not complete yet; a context manager."""

    def __init__(self, folder: Path, evaluation: Evaluation, sets: Mapping[str, Sequence[EvaluationProblem]]) -> None:
        """
        Args:
            sets: the problems of every benchmark in `evaluation`, by name.
        """
        self._folder, self._evaluation, self._sets = folder, evaluation, sets
        self._stack = ExitStack()
        self._journals: dict[str, Journal] = {}
        for name in sets:
            if not self._is_complete(name):
                self._journals[name] = self._stack.enter_context(Journal(folder / "samples" / f"{name}.partial.jsonl"))
                self._take_over(name)

    @property
    def missing(self) -> list[Wanted]:
        """The samples that have to be drawn."""
        seed = self._evaluation.protocol.seed
        return [
            one
            for name, journal in self._journals.items()
            for one in wanted(name, self._sets[name], self._samples(name), seed, journal.rows)
        ]

    async def fill(
        self, source: SampleSource | None, graders: Graders, progress: Callable[[SampleRow], None] = lambda _: None
    ) -> None:
        """Draw and grade what is missing. Afterwards every set has its file.

        Args:
            source: may be None where nothing is missing.
            progress: called with every sample that is drawn.

        Raises:
            EngineError, DeadlineError: as the engine raises; what has been drawn is kept.
        """
        missing = self.missing
        left = {name: sum(one.benchmark == name for one in missing) for name in self._journals}
        try:
            async with asyncio.TaskGroup() as grading:
                for name in [name for name, number in left.items() if not number]:
                    grading.create_task(self._complete(name, graders))

                def found(one: Wanted, row: SampleRow) -> None:
                    self._journals[one.benchmark].add(row)
                    progress(row)
                    left[one.benchmark] -= 1
                    if not left[one.benchmark]:  # graded while the other sets are sampled
                        grading.create_task(self._complete(one.benchmark, graders))

                if source is not None and missing:
                    await draw(source.engine, missing, self._evaluation.protocol, source.tokenizer, source.at_once, found)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _complete(self, name: str, graders: Graders) -> None:
        rows = self._journals[name].ordered((p.problem_id for p in self._sets[name]), self._samples(name))
        graded = await graders.grade(rows, self._evaluation.benchmarks[name].grader)
        write_samples(samples_file(self._folder, name), graded)
        self._journals.pop(name).remove()

    def _samples(self, name: str) -> int:
        return self._evaluation.benchmarks[name].samples

    def _is_complete(self, name: str) -> bool:
        path = samples_file(self._folder, name)
        return path.is_file() and count_samples(path) == len(self._sets[name]) * self._samples(name)

    def _take_over(self, name: str) -> None:
        """Take over the samples of an evaluation that had fewer samples a problem."""
        path, journal = samples_file(self._folder, name), self._journals[name]
        for row in read_samples(path) if path.is_file() else ():
            if (row.problem_id, row.sample) not in journal.rows:
                journal.add(row)

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
