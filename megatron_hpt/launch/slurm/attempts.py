"""The tries of a batch job that did not finish its run: RUN.slurm/tries.json, and when to give up.

A try notes that it has begun, because one whose own node is lost cannot note how it ended.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_hpt.files import write_whole

HOPELESS = 3
"""Tries in a row without a newer checkpoint after which a job is not started again."""
LOST = "ended without a word: the node of its supervisor was lost, or Slurm requeued the job"


@dataclass(frozen=True)
class Try:
    """One try that did not finish the run."""

    job: int
    attempt: int
    nodes: tuple[str, ...]
    reason: str
    checkpoint: int
    """Newest one when it ended; 0: none."""


def hopeless(tries: Sequence[Try]) -> str | None:
    """Why a job is not started again; None: it is."""
    newest, without = 0, 0
    for each in tries:
        without = 0 if each.checkpoint > newest else without + 1
        newest = max(newest, each.checkpoint)
    if without < HOPELESS:
        return None
    return f"{without} tries in a row without a checkpoint after step {newest}: the job is not started again"


class Tries:
    """What is kept of them in a folder."""

    def __init__(self, folder: Path) -> None:
        self.file, self._begun = folder / "tries.json", folder / "begun.json"

    def begin(self, job: int, attempt: int, nodes: Sequence[str], checkpoint: int) -> str | None:
        """Note that a try begins; returns why it should not, if those before were too many.

        A try of the same job that began and noted no end was lost. Not so one of another job: that was cancelled.

        Args:
            checkpoint: newest one; 0: none.
        """
        if self._begun.is_file():
            before = _try(json.loads(self._begun.read_text(encoding="utf-8")))
            if before.job == job and before.attempt < attempt:
                self._add(replace(before, checkpoint=checkpoint))
        write_whole(self._begun, json.dumps(asdict(Try(job, attempt, tuple(nodes), LOST, checkpoint))))
        return hopeless(self.all())

    def fail(self, failed: Try) -> str | None:
        """Note how a try ended; returns why there should be no other one."""
        self._add(failed)
        self.end()
        return hopeless(self.all())

    def end(self) -> None:
        """The try ended as it should."""
        self._begun.unlink(missing_ok=True)

    def all(self) -> list[Try]:
        """Oldest first."""
        return [_try(each) for each in json.loads(self.file.read_text(encoding="utf-8"))] if self.file.is_file() else []

    def _add(self, failed: Try) -> None:
        write_whole(self.file, json.dumps([asdict(each) for each in (*self.all(), failed)], indent=1))


def _try(fields: dict) -> Try:
    return Try(**{**fields, "nodes": tuple(fields["nodes"])})
