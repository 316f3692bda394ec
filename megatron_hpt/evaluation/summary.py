"""The table of one evaluation: a row a benchmark, every accuracy with its confidence interval."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from megatron_hpt.evaluation.majority import majority_at_k, votes
from megatron_hpt.evaluation.samples import SampleRow
from megatron_hpt.evaluation.statistics import Estimate, average_at_k, estimate, graded, pass_at_k, powers_of_two, ungraded


@dataclass(frozen=True)
class Summary:
    """What is told of one benchmark; an estimate is None where nothing was graded."""

    problems: int
    samples: int
    """A problem (k)."""
    average: Estimate | None
    passes: dict[int, Estimate | None]
    """pass@k for k = 2, 4 … and all samples (pass@1 is the average of binary scores)."""
    majority: Estimate | None
    tokens: float
    """Mean length of a response."""
    truncated: float
    """Share of the responses that hit the limit."""
    ungraded: int


def summarize(rows: Sequence[SampleRow]) -> Summary:
    """Summarise the samples of one benchmark (at least one)."""
    problems: dict[str, list[SampleRow]] = {}
    for row in rows:
        problems.setdefault(row.problem_id, []).append(row)
    groups = list(problems.values())
    scores = [[row.score for row in group] for group in groups]
    k = max(map(len, groups))
    return Summary(
        problems=len(groups),
        samples=k,
        average=average_at_k(scores),
        passes={each: pass_at_k(scores, each) for each in powers_of_two(k)},
        majority=estimate([_majority(group, k) for group in groups]),
        tokens=statistics.fmean(row.tokens for row in rows),
        truncated=statistics.fmean(row.truncated for row in rows),
        ungraded=ungraded(scores),
    )


def _majority(group: Sequence[SampleRow], k: int) -> float | None:
    scores = [row.score for row in group]
    return majority_at_k(votes([row.answer for row in group], scores), [k])[0] if len(graded(scores)) == k else None


def table(summaries: Mapping[str, Summary], titles: Mapping[str, str]) -> Table:
    """Draw it.

    Args:
        titles: how a benchmark is called, where it has another name.
    """
    ks = sorted({k for summary in summaries.values() for k in summary.passes})
    drawn = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left")
    drawn.add_column("benchmark", no_wrap=True)
    for name in ("problems", "k", "avg@k", *(f"pass@{k}" for k in ks), "maj@k", "tokens", "truncated", "ungraded"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        drawn.add_row(
            titles.get(name, name),
            str(summary.problems),
            str(summary.samples),
            percent(summary.average),
            *(percent(summary.passes[k]) if k in summary.passes else "" for k in ks),
            percent(summary.majority) if summary.samples > 1 else "",
            f"{summary.tokens:,.0f}",
            f"{100 * summary.truncated:.1f}%",
            str(summary.ungraded),
        )
    drawn.caption = "percent, with 95% confidence intervals over problems"
    return drawn


def percent(value: Estimate | None) -> str:
    """``52.7 (44–61)``."""
    return "-" if value is None else f"{100 * value.value:.1f} ({100 * value.low:.0f}–{100 * value.high:.0f})"
