"""Continuing an evaluation that was interrupted, or that now wants more. It must be sampled and graded in the same way."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from megatron_hpt.errors import ConfigError
from megatron_hpt.evaluation.samples import RECORD, Evaluation, Protocol, read_record


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock the folder of an evaluation for this process alone.

    Raises:
        ConfigError: another process works in it.
    """
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is evaluating into this folder") from None
        yield


def continued(folder: Path, record: Evaluation) -> Evaluation:
    """Return the record of an evaluation that goes on: with the benchmarks that it has and those of `record`.

    Raises:
        ConfigError: what is in the folder was made in another way; names every difference.
    """
    if not (folder / RECORD).is_file():
        return record
    before = read_record(folder)
    if differ := differences(before, record):
        raise ConfigError(
            f"{folder} holds another evaluation: {'; '.join(differ)}. Give another folder with --out, or remove this one"
        )
    return replace(record, benchmarks={**before.benchmarks, **record.benchmarks})


def differences(before: Evaluation, now: Evaluation) -> list[str]:
    """Say why one cannot go on as the other. More samples a problem, and other benchmarks, are no reason."""
    pairs = [(key, getattr(before, key), getattr(now, key)) for key in ("model", "weights", "engine", "dtype", "overrides")]
    pairs += [(f.name, getattr(before.protocol, f.name), getattr(now.protocol, f.name)) for f in fields(Protocol)]
    found = [f"{key} was {one!r}, now {other!r}" for key, one, other in pairs if one != other]
    for name in [name for name in now.benchmarks if name in before.benchmarks]:
        one, other = before.benchmarks[name], now.benchmarks[name]
        if (one.sha256, one.problems) != (other.sha256, other.problems):
            found.append(f"{name}: {other.file} has other contents")
        if one.samples > other.samples:
            found.append(f"{name}: {one.samples} samples a problem are there, {other.samples} are asked for")
        if one.grader != other.grader:
            found.append(f"{name}: graded by {one.grader}, now {other.grader} (megatron-hpt regrade grades it again)")
    return found
