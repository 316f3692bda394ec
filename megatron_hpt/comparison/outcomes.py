"""Reading what is compared: evaluation folders with every sample, and runs.

Of a run the newest complete evaluation folder is taken; a run without one has only the means in its metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hpt.comparison.paper import column_of
from megatron_hpt.errors import DataError
from megatron_hpt.evaluation.samples import (
    RECORD,
    Evaluation,
    SetRecord,
    check_complete,
    read_columns,
    read_record,
    samples_file,
)
from megatron_hpt.run import RunDir

_COLUMNS = ("problem_id", "sample", "level", "ground_truth", "answer", "tokens", "truncated", "score")
"""The columns that are read: all but the texts, which are nearly all of a file."""


@dataclass(frozen=True)
class SampledProblem:
    """One problem and the samples of it, in their order."""

    id: str
    group: str | None
    """The problem's level, or its subject, where the data has one."""
    ground_truth: str
    scores: tuple[float | None, ...]
    answers: tuple[str | None, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class ModelOutcome:
    """A model on one benchmark."""

    name: str
    record: SetRecord
    problems: tuple[SampledProblem, ...]

    def restricted(self, ids: Iterable[str]) -> ModelOutcome:
        """Return the outcome on some of the problems, in the order of `ids`."""
        known = {problem.id: problem for problem in self.problems}
        return replace(self, problems=tuple(known[one] for one in ids))


@dataclass(frozen=True)
class Entry:
    """A row of the table: a model and what it did."""

    label: str
    outcomes: Mapping[str, ModelOutcome] = field(default_factory=dict)
    """The outcomes by column of the table (`paper.column_of`)."""
    reported: Mapping[str, float] = field(default_factory=dict)
    """Mean scores by column, where there are no samples: of a run that kept none, or of the paper."""
    record: Evaluation | None = None
    """None: no samples were kept."""
    lines: Sequence[dict[str, Any]] = ()
    """The lines of metrics, if the entry is a run."""
    notes: tuple[str, ...] = ()
    """What a reader of the table has to know of it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that the entry has something for."""
        return (*self.outcomes, *self.reported)


def read_entries(arguments: Sequence[str]) -> list[Entry]:
    """Read what is to be compared.

    Args:
        arguments: folders of evaluations and run directories, each as ``PATH`` or ``LABEL=PATH``.

    Raises:
        DataError: a folder is neither, or an evaluation is not finished; two entries have one label.
    """
    named = [_named(argument) for argument in arguments]
    entries = [_read(path, label) for label, path in named]
    if len({entry.label for entry in entries}) < len(entries):  # one model evaluated twice: tell them apart by their folders
        entries = [
            entry if label else replace(entry, label=str(path)) for entry, (label, path) in zip(entries, named, strict=True)
        ]
    labels = [entry.label for entry in entries]
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise DataError(f"two entries are called {doubled!r}; give each a name of its own: NAME={named[0][1]} …")
    return entries


def _named(argument: str) -> tuple[str | None, Path]:
    """Split an argument into a label, if it has one, and a path. A path that exists may have an equals sign in it."""
    label, separator, path = argument.partition("=")
    return (label, Path(path)) if separator and not Path(argument).exists() else (None, Path(argument))


def _read(path: Path, label: str | None) -> Entry:
    if (path / RECORD).is_file():
        return _evaluation(path, label)
    run = RunDir(path)
    if not run.config.is_file():
        raise DataError(
            f"{path}: neither the folder of an evaluation (it has no {RECORD}) nor a run directory (no config.yaml)"
        )
    from megatron_hpt.telemetry import metrics  # TensorBoard and torch, seconds that evaluations do without

    lines = metrics.read(run.metrics)
    complete = [folder for record in path.glob(f"evaluations/*/{RECORD}") if _is_complete(folder := record.parent)]
    if complete:
        newest = max(complete, key=lambda folder: read_record(folder).step or 0)
        return replace(_evaluation(newest, label or path.name), lines=lines)
    return _summary(path, label or path.name, lines)


def _is_complete(folder: Path) -> bool:
    return all(samples_file(folder, name).is_file() for name in read_record(folder).benchmarks)


def _evaluation(path: Path, label: str | None) -> Entry:
    record = read_record(path)
    outcomes: dict[str, ModelOutcome] = {}
    for name, column in _columns(list(record.benchmarks)).items():
        file = samples_file(path, name)
        if not file.is_file():
            raise DataError(f"{path}: not finished, {name} has no samples yet; the command that wrote it continues it")
        outcomes[column] = ModelOutcome(name, record.benchmarks[name], read_problems(file, record.benchmarks[name]))
    return Entry(label or _label(path, record.step), outcomes, record=record)


def _label(path: Path, step: int | None) -> str:
    """Call an evaluation by its folder, and one inside a run by the run and the step."""
    folder = path.resolve()
    run = folder.parent.parent
    return f"{run.name} @{step}" if RunDir(run).config.is_file() else folder.name


def _columns(names: Sequence[str]) -> dict[str, str]:
    """Return name → column of one evaluation. Of two that share a column (amc, amc23) the second gets one of its own."""
    columns: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.lower() != column_of(name).lower()):
        column = column_of(name)
        columns[name] = name if column in columns.values() else column
    return columns


def read_problems(file: Path, record: SetRecord) -> tuple[SampledProblem, ...]:
    """Read the samples of one benchmark by problem, in the order of the file, without their texts.

    Raises:
        DataError: not a file of samples, or not those that the evaluation's record tells of.
    """
    rows = read_columns(file, _COLUMNS)
    check_complete(file, ((row["problem_id"], row["sample"]) for row in rows), record)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["problem_id"], []).append(row)
    return tuple(_problem(name, samples) for name, samples in grouped.items())


def _problem(name: str, samples: Sequence[dict[str, Any]]) -> SampledProblem:
    scores, answers, tokens, truncated = (
        tuple(sample[column] for sample in samples) for column in ("score", "answer", "tokens", "truncated")
    )
    group = samples[0]["level"] or _subject(name)
    return SampledProblem(name, group, samples[0]["ground_truth"], scores, answers, tokens, truncated)


def _subject(name: str) -> str | None:
    """Return the subject in a name of MATH's, whose files have no levels: test/precalculus/807.json."""
    parts = name.split("/")
    return parts[1] if len(parts) == 3 and parts[0] in ("train", "test") and parts[2].endswith(".json") else None


def _summary(path: Path, label: str, lines: Sequence[dict[str, Any]]) -> Entry:
    """Make an entry of the newest means in a run's metrics."""
    found = {
        key: line for line in lines for key in line if key.startswith("eval/") and "/avg@" in key and line[key] is not None
    }
    if not found:
        raise DataError(f"{path}: the run has evaluated nothing yet; give it evaluation.sets, or evaluate its checkpoint")
    sets = {key: key.removeprefix("eval/").partition("/avg@") for key in found}
    reported = {column_of(name): found[key][key] for key, (name, _, _) in sets.items()}
    versions = sorted({line["eval/version"] for line in found.values()})
    samples = ", ".join(f"{name} avg@{k}" for name, _, k in sets.values())
    note = (
        f"{label}: means from the metrics of version {versions[-1]} ({samples}). No sample was kept: no interval, no exclusive "
        "solves, and nothing checks that the problems and the sampling were the same"
    )
    return Entry(label, reported=reported, lines=lines, notes=(note,))
