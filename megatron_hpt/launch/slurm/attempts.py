"""Tries of a batch job that did not finish its run, kept in RUN.slurm/tries.json, and when to give up.

A try notes that it has begun, because a try whose own node is lost cannot note how it ended.
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
    """Slurm's number of the job."""
    attempt: int
    """Number of times that Slurm had requeued the job before."""
    nodes: tuple[str, ...]
    reason: str
    checkpoint: int
    """Step of the newest checkpoint when the try ended; 0 if there was none."""


def hopeless(tries: Sequence[Try]) -> str | None:
    """Return why a job is not started again, or None if it is.

    Args:
        tries: oldest first.
    """
    newest, without = 0, 0
    for failed in tries:
        without = 0 if failed.checkpoint > newest else without + 1
        newest = max(newest, failed.checkpoint)
    if without < HOPELESS:
        return None
    return f"{without} tries in a row without a checkpoint after step {newest}: the job is not started again"


class Tries:
    """The tries of one run, kept in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.file, self._begun = folder / "tries.json", folder / "begun.json"

    def begin(self, job: int, attempt: int, nodes: Sequence[str], checkpoint: int) -> str | None:
        """Note that a try begins; return why it should not, or None.

        An earlier try of the same job that noted its beginning and no end was lost, and counts as failed. One of another job
        was cancelled, and does not count.

        Args:
            checkpoint: step of the newest checkpoint; 0 if there is none.
        """
        if self._begun.is_file():
            before = _try(json.loads(self._begun.read_text(encoding="utf-8")))
            if before.job == job and before.attempt < attempt:
                self._add(replace(before, checkpoint=checkpoint))
        write_whole(self._begun, json.dumps(asdict(Try(job, attempt, tuple(nodes), LOST, checkpoint))))
        return hopeless(self.all())

    def fail(self, failed: Try) -> str | None:
        """Note how a try failed; return why there should be no other one, or None."""
        self._add(failed)
        self.end()
        return hopeless(self.all())

    def end(self) -> None:
        """Note that the try ended as it should."""
        self._begun.unlink(missing_ok=True)

    def all(self) -> list[Try]:
        """Return the failed tries, oldest first."""
        return [_try(fields) for fields in json.loads(self.file.read_text(encoding="utf-8"))] if self.file.is_file() else []

    def _add(self, failed: Try) -> None:
        write_whole(self.file, json.dumps([asdict(each) for each in (*self.all(), failed)], indent=1))


def _try(fields: dict) -> Try:
    return Try(**{**fields, "nodes": tuple(fields["nodes"])})
