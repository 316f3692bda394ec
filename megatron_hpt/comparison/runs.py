"""Several algorithms from one start: what each run reached and used, as a table and as curves."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hpt.comparison.text_table import Cell, TextTable, markdown
from megatron_hpt.errors import DataError
from megatron_hpt.files import whole

Lines = Sequence[dict[str, Any]]
"""The metrics of one run."""
_PHASES = ("rollout", "reward", "train", "transfer")


@dataclass(frozen=True)
class Reached:
    """One finished run."""

    accuracy: float
    """Held-out accuracy of the final weights."""
    solved: float
    """The share of held-out prompts that were solved at least once in k samples."""
    generated: int
    """How many tokens were sampled for training."""
    trained: int
    """How many response tokens were in the loss."""
    seconds: float
    """The time of all steps, without start and evaluations."""


def reached(lines: Lines) -> Reached:
    """Read from its metrics what a run reached.

    Raises:
        DataError: no evaluation of the final weights.
    """
    key = accuracy_key(lines)
    if lines[-1].get(key) is None:
        raise DataError(f"the run's last line has no {key}; it did not finish, or nothing was held out")
    return Reached(
        accuracy=lines[-1][key],
        solved=lines[-1][key.replace("/avg@", "/solved@")],
        generated=sum(line["rollout/tokens"] for line in lines),
        trained=sum(line["train/tokens"] for line in lines),
        seconds=sum(line.get(f"time/{phase}_s", 0.0) for line in lines for phase in _PHASES),
    )


def accuracy_key(lines: Lines) -> str:
    """Return the name of the metric of held-out accuracy.

    Raises:
        DataError: nothing was evaluated.
    """
    key = next((key for line in lines for key in line if key.startswith("eval/") and "/avg@" in key), None)
    if key is None:
        raise DataError("the run evaluated nothing; give it evaluation.sets")
    return key


def is_finished(lines: Lines) -> bool:
    """Whether the last line has the evaluation of the final weights."""
    return any(key.startswith("eval/") and "/avg@" in key and value is not None for key, value in lines[-1].items())


def grid(runs: Mapping[str, Sequence[Lines]], what: str = "algorithm", title: str = "") -> TextTable:
    """Make a table with one row an algorithm: mean ± standard deviation over its seeds.

    Args:
        runs: algorithm → the metrics of its seeds.
        what: the heading of the first column.
    """
    columns = (what, "seeds", "held-out accuracy", "solved at least once", "generated tokens", "trained tokens", "seconds")
    return TextTable(title, columns, [_row(name, [reached(lines) for lines in seeds]) for name, seeds in runs.items()])


def table(runs: Mapping[str, Sequence[Lines]]) -> str:
    """`grid` in Markdown."""
    return markdown(grid(runs))


def _row(name: str, seeds: Sequence[Reached]) -> list[Cell]:
    accuracy, solved = ([getattr(seed, field) for seed in seeds] for field in ("accuracy", "solved"))
    used = [statistics.fmean(getattr(seed, field) for seed in seeds) for field in ("generated", "trained", "seconds")]
    texts = [name, str(len(seeds)), spread(accuracy), spread(solved), *(f"{mean:,.0f}" for mean in used)]
    return [Cell(text) for text in texts]


def spread(values: Sequence[float]) -> str:
    """Write mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def draw(runs: Mapping[str, Sequence[Lines]], path: Path) -> None:
    """Write the `picture` of runs to a file."""
    with whole(path) as temporary:
        temporary.write_bytes(picture(runs, "png"))


def picture(runs: Mapping[str, Sequence[Lines]], form: str) -> bytes:
    """Draw held-out accuracy by step and by tokens, and the SFT share: means over seeds, the range of accuracy as a band.

    Args:
        form: png or svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (accuracy, by_tokens, share) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for index, (name, seeds) in enumerate(runs.items()):
        color = f"C{index}"
        steps, rows = aligned([evaluations(lines) for lines in seeds])
        accuracy.plot(steps, [statistics.fmean(row) for row in rows], marker="o", markersize=3, color=color, label=name)
        accuracy.fill_between(steps, [min(row) for row in rows], [max(row) for row in rows], color=color, alpha=0.12)
        used, means = _by_tokens(seeds)
        by_tokens.plot(used, means, marker="o", markersize=3, color=color, label=name)
        steps, rows = aligned([{line["step"]: line["gate/demonstration_weight"] for line in lines} for lines in seeds])
        share.plot(steps, [statistics.fmean(row) for row in rows], linewidth=1.3, color=color, label=name)
    accuracy.set_title("held-out accuracy (mean and range over seeds)", fontsize=10, loc="left")
    by_tokens.set_title("held-out accuracy by thousands of tokens generated and trained", fontsize=10, loc="left")
    share.set_title("weight of demonstrations, mean over prompts", fontsize=10, loc="left")
    for axis, unit in ((accuracy, "step"), (by_tokens, "thousand tokens"), (share, "step")):
        axis.set_xlabel(unit, fontsize=9)
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    accuracy.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _by_tokens(seeds: Sequence[Lines]) -> tuple[list[float], list[float]]:
    """Return thousands of tokens generated and trained before each evaluation, and the accuracy there; means over seeds."""
    steps, rows = aligned([evaluations(lines) for lines in seeds])
    spent = [
        [sum(line["rollout/tokens"] + line["train/tokens"] for line in lines if line["step"] < step) for lines in seeds]
        for step in steps
    ]
    return [statistics.fmean(row) / 1000 for row in spent], [statistics.fmean(row) for row in rows]


def evaluations(lines: Lines) -> dict[int, float]:
    """Return held-out accuracy by version of the weights."""
    key = accuracy_key(lines)
    return {line["eval/version"]: line[key] for line in lines if line.get(key) is not None}


def aligned(curves: Sequence[Mapping[int, float]]) -> tuple[list[int], list[list[float]]]:
    """Return the steps that all curves have, and the curves' values there."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, [[curve[step] for curve in curves] for step in steps]
