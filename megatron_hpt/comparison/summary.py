"""The table of one evaluation: a row a benchmark, every accuracy with its confidence interval."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from megatron_hpt.comparison.measures import Measures
from megatron_hpt.evaluation.statistics import Estimate


def table(summaries: Mapping[str, Measures], titles: Mapping[str, str]) -> Table:
    """Make the table.

    Args:
        titles: benchmark → the name that is shown, where it has another one.
    """
    ks = sorted({k for summary in summaries.values() for k in summary.passed})
    drawn = Table(box=None, header_style="bold", pad_edge=False, caption_justify="left")
    drawn.add_column("benchmark", no_wrap=True)
    for name in ("problems", "k", "avg@k", *(f"pass@{k}" for k in ks), "maj@k", "tokens", "truncated", "ungraded"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        drawn.add_row(
            titles.get(name, name),
            str(summary.problems),
            str(summary.k),
            percent(summary.average),
            *(percent(summary.passed[k]) if k in summary.passed else "" for k in ks),
            percent(summary.majority.get(summary.k)) if summary.k > 1 else "",
            f"{summary.tokens:,.0f}",
            f"{100 * summary.truncated:.1f}%",
            str(summary.ungraded),
        )
    drawn.caption = "percent, with 95% confidence intervals over problems"
    return drawn


def percent(value: Estimate | None) -> str:
    """Write an estimate in percent with its interval: ``52.7 (44–61)``."""
    return "-" if value is None else f"{100 * value.value:.1f} ({100 * value.low:.0f}–{100 * value.high:.0f})"
