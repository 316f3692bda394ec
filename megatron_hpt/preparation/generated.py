"""Problems that reasoning-gym makes, as records like those of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hpt.data.parquet import Problem
from megatron_hpt.errors import DataError, did_you_mean
from megatron_hpt.preparation.fields import Unfit, answer, text, value
from megatron_hpt.preparation.formats import Named, RecordFormat
from megatron_hpt.preparation.reading import BATCH, Record, RecordBatch


@dataclass(frozen=True)
class Generated:
    """The problems of one task; the same seed gives the same problems."""

    task: str
    rows: int
    seed: int
    dataset: Any

    def batches(self) -> Iterator[RecordBatch]:
        """Yield all problems in batches; a problem counts as a byte."""
        for first in range(0, self.rows, BATCH):
            numbers = range(first, min(first + BATCH, self.rows))
            yield RecordBatch([Record(f"reasoning_gym/{self.task}", row, self.dataset[row]) for row in numbers], len(numbers))

    def format(self, entries: bool) -> RecordFormat:
        """Return how an item of reasoning-gym becomes a problem.

        Args:
            entries: the ground truth is the whole item as JSON, by which reasoning-gym's own scoring judges (many tasks have
                more than one right answer, or none that is written down); otherwise it is the item's answer.
        """

        def read(fields: Mapping[str, Any]) -> Named:
            row = value(fields, "metadata.source_index")
            truth = json.dumps(fields, default=_plain) if entries else answer(value(fields, "answer"), "answer")
            return Named(
                Problem(text(value(fields, "question"), "question"), truth, None), None, f"{self.task}-{self.seed}-{row}"
            )

        return RecordFormat(f"reasoning_gym/{self.task}", ("question", "answer", "metadata"), (), read)


def _plain(given: Any) -> Any:
    raise Unfit(f"metadata: a {type(given).__name__} cannot be written as JSON")


def generate(task: str, rows: int, seed: int, parameters: Mapping[str, Any]) -> Generated:
    """Make the problems of a task.

    Args:
        parameters: settings of the task, e.g. min_terms.

    Raises:
        DataError: the package is not installed; no such task; parameters that it does not take.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(f"reasoning-gym is not installed ({error}): pip install --no-deps -r requirements/host.txt") from None
    if task not in DATASETS:
        raise DataError(f"reasoning-gym: given {task!r}; it has {', '.join(sorted(DATASETS))}{did_you_mean(task, DATASETS)}")
    try:
        dataset = reasoning_gym.create_dataset(task, size=rows, seed=seed, **parameters)
    except (TypeError, ValueError, AssertionError) as error:  # how its configurations refuse
        raise DataError(f"reasoning-gym, task {task}: {error}") from None
    return Generated(task, rows, seed, dataset)
