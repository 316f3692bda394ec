"""What the report shows of a run's metrics: curves on a common grid, facts, and notes that a reader should see first."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.errors import DataError
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.overrides import load_yaml, read_yaml
from megatron_hpt.run import RunDir
from megatron_hpt.settings.values import dump
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.progress import duration

Lines = Sequence[dict[str, Any]]
MOST_POINTS = 500
"""Points of a curve; a longer run's steps are averaged in groups."""
_EVALUATED = re.compile(r"eval/.+/[a-z]+@\d+")


@dataclass(frozen=True)
class Grid:
    """Where points stand, by each of the axes that can be chosen; each list has an entry for every point."""

    step: list[int]
    hours: list[float]
    tokens: list[int]
    """Tokens generated and trained."""

    def at(self, places: Sequence[int]) -> Grid:
        """Return the points of these indices."""
        return Grid(*([column[place] for place in places] for column in (self.step, self.hours, self.tokens)))

    def plus(self, other: Grid) -> Grid:
        """Return these points followed by the others."""
        return Grid(self.step + other.step, self.hours + other.hours, self.tokens + other.tokens)


def _cumulated(values: Sequence[float]) -> list[Any]:
    return list(itertools.accumulate(values))


@dataclass(frozen=True)
class RunRecord:
    """One run: its name in the report, configuration and lines of metrics."""

    run: RunDir
    label: str
    config: Config
    lines: Lines

    @cached_property
    def spent(self) -> Grid:
        """Time and tokens that were spent up to the end of each step."""
        seconds = _cumulated([(line.get("time/step_s") or 0.0) + (line.get("time/eval_s") or 0.0) for line in self.lines])
        tokens = _cumulated([(line.get("rollout/tokens") or 0) + (line.get("train/tokens") or 0) for line in self.lines])
        return Grid([line["step"] for line in self.lines], [value / 3600 for value in seconds], tokens)

    @property
    def per_point(self) -> int:
        """The number of steps that are averaged into one point of a curve."""
        return -(-len(self.lines) // MOST_POINTS)

    @cached_property
    def grid(self) -> Grid:
        """Where the points of a curve stand: at the end of each `per_point` steps, and of the last."""
        ends = [min(first + self.per_point, len(self.lines)) - 1 for first in range(0, len(self.lines), self.per_point)]
        return self.spent.at(ends)

    def curve(self, key: str) -> list[float | None]:
        """Return a metric on the grid, with None where no step of the point has a value."""
        groups = (self.lines[first : first + self.per_point] for first in range(0, len(self.lines), self.per_point))
        measured = ([value for line in group if (value := line.get(key)) is not None] for group in groups)
        return [sum(values) / len(values) if values else None for values in measured]

    def evaluations(self, key: str) -> tuple[Grid, list[float]]:
        """Return an evaluation on a grid of its own, whose steps are the versions of the weights that were evaluated."""
        evaluated = [(line["eval/version"], line[key]) for line in self.lines if line.get(key) is not None]
        start = self.lines[0]["step"]
        before = Grid([start], [0.0], [0]).plus(self.spent)
        places = [min(max(version - start, 0), len(self.lines)) for version, _ in evaluated]
        return replace(before.at(places), step=[version for version, _ in evaluated]), [value for _, value in evaluated]

    @property
    def evaluated(self) -> list[str]:
        """Keys of the evaluations that are shares of answers or prompts: ``eval/<set>/<measure>@<k>``."""
        return sorted({key for line in self.lines for key in line if _EVALUATED.fullmatch(key)})

    @cached_property
    def not_taken(self) -> list[int]:
        """The steps of which no update was taken."""
        return [line["step"] for line in self.lines if line.get("train/skipped") and not line.get("train/updates")]

    @cached_property
    def taken_in_part(self) -> list[int]:
        """The steps of which some updates were taken and others were not."""
        return [line["step"] for line in self.lines if line.get("train/skipped") and line.get("train/updates")]


def read(run: RunDir, label: str) -> RunRecord:
    """Read a run's record.

    Raises:
        DataError: the run has no finished step yet.
    """
    lines = metrics.read(run.metrics)
    if not lines:
        raise DataError(f"{run.metrics}: no finished step to draw; wait for the first, or leave this run out")
    return RunRecord(run, label, load_yaml(run.config), lines)


def labels(runs: Sequence[RunDir]) -> list[str]:
    """Return short names that tell the runs apart: those of the recipes, else of the folders, else their paths."""
    paths = [run.path.resolve() for run in runs]
    common = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    options = (
        [load_yaml(run.config).name for run in runs] if len(runs) > 1 else [paths[0].name],
        [path.name for path in paths],
        [str(path.relative_to(common)) for path in paths],
    )
    return next((names for names in options if len(set(names)) == len(names)), options[-1])


def facts(record: RunRecord) -> dict[str, str]:
    """Return what a reader wants to know of a run first, title → text."""
    lines, config = record.lines, record.config
    folder = record.run.path.resolve().name
    result = {
        **({"folder": folder} if folder != record.label else {}),
        "model": config.model.path,
        "data": str(config.data.train),
        "algorithm": config.algorithm.name,
        "gate": of_run(config).gate.formula,
        "steps": f"{len(lines)} of {config.trainer.steps}",
        "prompts × answers per step": f"{config.trainer.prompts_per_step} × {config.rollout.samples_per_prompt}",
        "SFT share": _from_to([line.get("gate/sft_share") for line in lines], ".2f"),
        "accuracy of rollouts": _from_to([line.get("rollout/accuracy") for line in lines], ".3f"),
    }
    for key in record.evaluated:
        result[evaluation_title(key)] = _from_to([line.get(key) for line in lines], ".3f")
    mismatch = [value for line in lines if (value := line.get("mismatch/k3_kl")) is not None]
    result["largest mismatch (k3 KL)"] = f"{max(mismatch):.2g}" if mismatch else "not measured"
    result["steps not taken"] = str(len(record.not_taken))
    result["tokens generated"] = f"{sum(line.get('rollout/tokens') or 0 for line in lines):,}"
    result["tokens trained"] = f"{sum(line.get('train/tokens') or 0 for line in lines):,}"
    result["time"] = duration(record.spent.hours[-1] * 3600)
    return result


def evaluation_title(key: str) -> str:
    """Return how an evaluation's key is shown: ``eval/heldout/avg@8`` as "heldout avg@8"."""
    return key.removeprefix("eval/").replace("/", " ")


def _from_to(values: Sequence[float | None], form: str) -> str:
    """Format the first and the last value that was measured, and the highest where it lies between them."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "not measured"
    first, last, highest = measured[0], measured[-1], max(measured)
    ends = f"{first:{form}} → {last:{form}}"
    return ends if highest in (first, last) or len(measured) < 3 else f"{ends} (highest {highest:{form}})"


def notes(record: RunRecord) -> list[str]:
    """Return what a reader should know before the curves, a sentence each."""
    return list(_notes(record))


def _notes(record: RunRecord) -> Iterator[str]:
    done, steps = len(record.lines), record.config.trainer.steps
    if done < steps:
        yield f"{done} of {steps} steps are finished: the run goes on, or ended early."
    for how, skipped in (("not taken", record.not_taken), ("taken in part", record.taken_in_part)):
        if skipped:
            shown = ", ".join(map(str, skipped[:8])) + (" …" if len(skipped) > 8 else "")
            reasons = {line.get("train/skip_reason") for line in record.lines if line["step"] in skipped}
            given = "; ".join(sorted(filter(None, reasons))[:3]) or "no reason recorded"
            yield f"{len(skipped)} of the steps were {how} (step {shown}): {given}"
    if not record.evaluated:
        yield "Nothing was evaluated on held-out problems (evaluation.sets)."
    if record.per_point > 1:
        yield f"A point of a curve is the mean of {record.per_point} steps."


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the settings in which the runs differ, with each run's value in the order of the runs."""
    flat = [dict(_leaves(read_yaml(record.run.config), "")) for record in records]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, "—") for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, dump(tree, one_line=True)
