"""pass@k and maj@k against k, one panel a benchmark."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

from megatron_hpt.comparison.measures import Measures

Panels = Mapping[str, Mapping[str, Measures]]
"""Benchmark → model → numbers."""


def draw(panels: Panels, form: str) -> bytes:
    """Draw the benchmarks that have several samples a problem.

    Args:
        form: png or svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (max(6.5, 4.6 * columns), 3.7 * rows + 0.7)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    colors: dict[str, str] = {}
    for axis, (title, models) in zip(axes.flat, panels.items(), strict=False):
        for label, measures in models.items():
            _curves(axis, label, measures, colors.setdefault(label, f"C{len(colors)}"))
        _frame(axis, title, sorted({k for measures in models.values() for k in measures.passed}))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    _legend(figure, colors)
    buffer = io.BytesIO()
    # A fixed salt and no date: the same numbers are the same file.
    with plt.rc_context({"svg.hashsalt": "megatron_hpt"}):
        figure.savefig(buffer, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    plt.close(figure)
    return buffer.getvalue()


def _curves(axis: Any, label: str, measures: Measures, color: str) -> None:
    ks = list(measures.passed)
    points = [measures.passed[k] for k in ks]
    axis.plot(ks, [100 * point.value for point in points], color=color, marker="o", markersize=3.5, linewidth=1.6)
    axis.fill_between(ks, [100 * p.low for p in points], [100 * p.high for p in points], color=color, alpha=0.12, linewidth=0)
    ks = list(measures.majority)
    axis.plot(ks, [100 * measures.majority[k].value for k in ks], color=color, linestyle="--", linewidth=1.2)


def _frame(axis: Any, title: str, ks: list[int]) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_xlabel("k", fontsize=9)
    axis.set_ylabel("problems solved, %", fontsize=9)
    axis.set_ylim(-2, 102)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, colors: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    models = [Line2D([], [], color=color, marker="o", markersize=3.5, label=label) for label, color in colors.items()]
    kinds = [
        Line2D([], [], color="#555", label="pass@k, with its 95% interval"),
        Line2D([], [], color="#555", linestyle="--", label="maj@k"),
    ]
    figure.legend(handles=models + kinds, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
