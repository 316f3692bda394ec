"""Models beside one another: results in the layout of the paper's table 2, exclusive solves as in its table 4."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hpt.comparison import paper
from megatron_hpt.comparison.comparable import comparable
from megatron_hpt.comparison.measures import Measures, measured
from megatron_hpt.comparison.outcomes import Entry, SampledProblem, read_entries
from megatron_hpt.comparison.paired import Difference, difference, mean_difference
from megatron_hpt.errors import DataError, did_you_mean
from megatron_hpt.evaluation.statistics import Estimate, Scores, mean_of


@dataclass(frozen=True)
class Column:
    """A column of the results: one benchmark, or the average of several."""

    title: str
    benchmarks: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One number of the results."""

    value: float
    estimate: Estimate | None = None
    """None: reported by others, or by a run that kept no samples."""


@dataclass(frozen=True)
class Versus:
    """The first entry against another one, on a benchmark."""

    other: str
    benchmark: str
    groups: Mapping[str, Difference]
    """By level or subject, where the data has one."""
    total: Difference


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown."""

    entries: Sequence[Entry]
    """As they were compared; those of a paper last, without samples."""
    columns: Sequence[Column]
    scores: Mapping[str, Mapping[str, Score]]
    """Label → title of the column."""
    measures: Mapping[str, Mapping[str, Measures]]
    """Benchmark → label."""
    versus: Sequence[Versus]
    published: frozenset[str]
    """Labels that come from the paper."""
    notes: Sequence[str]


def compare(arguments: Sequence[str], model: str | None, intersect: bool, across_protocols: bool) -> Comparison:
    """Read evaluations and runs, and compare them.

    Args:
        arguments: see `read_entries`; the first one is compared with each of the others.
        model: the paper's rows of this model are shown beside them; None: no rows of the paper.

    Raises:
        DataError: something cannot be read or compared, or the paper has no such model.
    """
    entries, notes = comparable(read_entries(arguments), intersect, across_protocols)
    columns = columns_of(entries)
    measures: dict[str, dict[str, Measures]] = {}
    for column in (column for column in columns if len(column.benchmarks) == 1):
        have = {e.label: e.outcomes[column.title] for e in entries if column.title in e.outcomes}
        if have:
            measures[column.title] = {label: measured(outcome.problems) for label, outcome in have.items()}
    published, more = _published(model, entries) if model else ([], [])
    rows = [*entries, *published]
    return Comparison(
        entries=rows,
        columns=columns,
        scores={entry.label: _scores(entry, columns, measures) for entry in rows},
        measures=measures,
        versus=[found for other in entries[1:] for found in _versus(entries[0], other, columns)],
        published=frozenset(entry.label for entry in published),
        notes=[*notes, *more],
    )


def columns_of(entries: Sequence[Entry]) -> list[Column]:
    """Return the columns in the paper's order: mathematics, average, general knowledge, average; then others by name."""
    there = {column for entry in entries for column in entry.columns}
    columns: list[Column] = []
    for group in (paper.MATHEMATICS, paper.GENERAL):
        present = tuple(title for title in group if title in there)
        columns += [Column(title, (title,)) for title in present]
        if len(present) > 1:
            name = "mathematics" if group is paper.MATHEMATICS else "general"
            columns.append(Column(f"Avg {name}" if present == group else f"Avg {name} ({len(present)})", present))
    others = sorted(there - {*paper.MATHEMATICS, *paper.GENERAL})
    return [*columns, *(Column(name, (name,)) for name in others)]


def _scores(entry: Entry, columns: Sequence[Column], measures: Mapping[str, Mapping[str, Measures]]) -> dict[str, Score]:
    """Return what a row shows. An average is shown only where the row has all of its benchmarks."""
    single: dict[str, Score] = {column: Score(value) for column, value in entry.reported.items()}
    for column in entry.outcomes:
        if (found := measures[column][entry.label].average) is not None:
            single[column] = Score(found.value, found)
    scores = {}
    for column in columns:
        parts = [single[name] for name in column.benchmarks if name in single]
        if len(parts) == len(column.benchmarks):
            estimates = [part.estimate for part in parts if part.estimate is not None]
            together = mean_of(estimates) if len(estimates) == len(parts) else None
            scores[column.title] = Score(sum(part.value for part in parts) / len(parts), together)
    return scores


def _published(model: str, entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Return the paper's rows of a model, and notes on what sets them apart."""
    if model not in paper.TABLES:
        known = ", ".join(paper.TABLES)
        raise DataError(f"--paper: given {model!r}; the paper reports {known}{did_you_mean(model, paper.TABLES)}")
    rows = [Entry(f"paper: {run}", reported=values) for run, values in paper.rows(model).items()]
    notes = [
        "rows of the paper (arXiv 2509.04419): avg@32 on AIME24, AIME25 and AMC, avg@1 elsewhere, temperature 0.6, top-p 0.95, "
        "8192 tokens; * taken by it from other papers"
    ]
    sizes = {len(entry.outcomes["AMC"].problems) for entry in entries if "AMC" in entry.outcomes}
    if sizes - {paper.AMC_PROBLEMS}:
        held = ", ".join(map(str, sorted(sizes)))
        notes.append(
            f"the paper's AMC is {paper.AMC_PROBLEMS} problems (AMC12 of 2022 and 2023), here it is {held}: another set"
        )
    return rows, notes


def _versus(first: Entry, other: Entry, columns: Sequence[Column]) -> list[Versus]:
    """Compare two entries on every benchmark that both have samples of, and on averages of those."""
    found = []
    for column in columns:
        if not all(name in entry.outcomes for name in column.benchmarks for entry in (first, other)):
            continue
        pairs = [_paired(first.outcomes[name].problems, other.outcomes[name].problems) for name in column.benchmarks]
        if len(pairs) > 1:
            total, groups = mean_difference([pair[:2] for pair in pairs]), {}
        else:
            ((mine, theirs, names),) = pairs
            total, groups = difference(mine, theirs), _by_group(mine, theirs, names)
        if total is not None:
            found.append(Versus(other.label, column.title, groups, total))
    return found


def _paired(first: Sequence[SampledProblem], other: Sequence[SampledProblem]) -> tuple[Scores, Scores, list[str | None]]:
    """Return both entries' scores of the same problems, in the order of the first, and the problems' groups."""
    theirs = {problem.id: problem.scores for problem in other}
    return [problem.scores for problem in first], [theirs[p.id] for p in first], [problem.group for problem in first]


def _by_group(first: Scores, other: Scores, names: Sequence[str | None]) -> dict[str, Difference]:
    found = {}
    for name in sorted({name for name in names if name is not None}, key=_natural):
        places = [place for place, group in enumerate(names) if group == name]
        inside = difference([first[place] for place in places], [other[place] for place in places])
        if inside is not None:
            found[name] = inside
    return found


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text) if part]
