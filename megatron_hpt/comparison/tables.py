"""The tables of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_hpt.comparison import runs
from megatron_hpt.comparison.comparison import Comparison, Score
from megatron_hpt.comparison.paired import Difference
from megatron_hpt.comparison.text_table import Cell, TextTable
from megatron_hpt.evaluation.statistics import Estimate

_NONE = Cell("–")


def grids(comparison: Comparison) -> list[TextTable]:
    """Make all tables that have a row."""
    parts = (_results(comparison), _exclusive(comparison), _curves(comparison), _samples(comparison), _runs(comparison))
    return [grid for grid in parts if grid.rows]


def _results(comparison: Comparison) -> TextTable:
    best = {
        column.title: max(
            (_percent(scores[column.title].value) for label, scores in _own(comparison) if column.title in scores),
            key=float,
            default=None,
        )
        for column in comparison.columns
    }
    rows = [
        [
            Cell(entry.label),
            *(
                _score(comparison.scores[entry.label].get(title), best[title], entry.label in comparison.published)
                for title in (column.title for column in comparison.columns)
            ),
        ]
        for entry in comparison.entries
    ]
    caption = "avg@k in percent, with its 95% interval over problems; the best is bold"
    caption += ", the paper's rows aside" if comparison.published else ""
    return TextTable("Results", ["model", *(column.title for column in comparison.columns)], rows, caption=caption)


def _own(comparison: Comparison) -> Iterator[tuple[str, Mapping[str, Score]]]:
    return ((label, scores) for label, scores in comparison.scores.items() if label not in comparison.published)


def _score(score: Score | None, best: str | None, is_published: bool) -> Cell:
    if score is None:
        return _NONE
    text = _percent(score.value)
    return Cell(text, _range(score.estimate) if score.estimate else "", text == best and not is_published)


def _exclusive(comparison: Comparison) -> TextTable:
    rows = []
    for versus in comparison.versus:
        names = versus.other, versus.benchmark
        rows += [
            [Cell(name) for name in (*names, group)] + _counts(one) + [Cell("")] * 3 for group, one in versus.groups.items()
        ]
        total = versus.total
        difference = Cell(_signed(total.value), f"{_signed(total.low)} to {_signed(total.high)}")
        verdict = [difference, Cell(_p_value(total.p_value)), Cell(total.test)]
        rows.append([*(Cell(name) for name in (*names, "all")), *_counts(total), *verdict])
    title = f"Exclusive solves of {comparison.entries[0].label}"
    caption = (
        "+ solved by it alone, − by the other alone, in problems and percent of them; with several samples a problem, "
        "as expected with one sample of each. Difference of avg@k in points, with its 95% interval. p: how likely a difference "
        "as large is between models that are equally good at every problem, not corrected for the number of rows"
    )
    columns = ["against", "benchmark", "group", "problems", "+", "−", "+ %", "− %", "difference", "p", "test"]
    return TextTable(title, columns, rows, left=3, caption=caption)


def _counts(one: Difference) -> list[Cell]:
    shares = [100 * count / one.problems for count in (one.plus, one.minus)]
    left_out = f"{one.left_out} left out" if one.left_out else ""
    counts = [Cell(f"+{_count(one.plus)}"), Cell(f"−{_count(one.minus)}")]
    return [Cell(str(one.problems), left_out), *counts, Cell(f"+{shares[0]:.1f}"), Cell(f"−{shares[1]:.1f}")]


def _count(number: float) -> str:
    return f"{number:.0f}" if abs(number - round(number)) < 1e-9 else f"{number:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _curves(comparison: Comparison) -> TextTable:
    """Make the table of pass@k and maj@k, of the benchmarks that have several samples a problem."""
    several = {name: models for name, models in comparison.measures.items() if any(len(m.passed) > 1 for m in models.values())}
    ks = sorted({k for models in several.values() for measures in models.values() for k in measures.passed})
    rows = [
        [Cell(benchmark), Cell(metric), Cell(label), *(_estimate(points.get(k)) for k in ks)]
        for benchmark, models in several.items()
        for metric in ("pass@k", "maj@k")
        for label, measures in models.items()
        for points in (measures.passed if metric == "pass@k" else measures.majority,)
    ]
    return TextTable("pass@k and maj@k", ["benchmark", "metric", "model", *(f"k={k}" for k in ks)], rows, left=3)


def _samples(comparison: Comparison) -> TextTable:
    rows = [
        [
            *(Cell(benchmark), Cell(label), Cell(str(measures.samples))),
            *(Cell(f"{measures.tokens:.0f}"), Cell(_percent(measures.truncated)), Cell(str(measures.ungraded))),
            Cell(str(measures.average.left_out) if measures.average else "all"),
        ]
        for benchmark, models in comparison.measures.items()
        for label, measures in models.items()
    ]
    columns = ["benchmark", "model", "samples", "mean tokens", "truncated %", "ungraded", "problems without a grade"]
    return TextTable(
        "Samples", columns, rows, left=2, caption="an ungraded sample is left out everywhere, never counted as wrong"
    )


def _runs(comparison: Comparison) -> TextTable:
    return runs.grid({label: [lines] for label, lines in finished(comparison)}, "run", "Runs")


def finished(comparison: Comparison) -> Iterator[tuple[str, runs.Lines]]:
    """Yield the runs whose metrics end with an evaluation of their final weights."""
    for entry in comparison.entries:
        if entry.lines and runs.is_finished(entry.lines):
            yield entry.label, entry.lines


def _estimate(estimate: Estimate | None) -> Cell:
    if estimate is None:
        return _NONE
    left_out = f", {estimate.left_out} left out" if estimate.left_out else ""
    return Cell(_percent(estimate.value), _range(estimate) + left_out)


def _range(estimate: Estimate) -> str:
    return f"{_percent(estimate.low)}–{_percent(estimate.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
