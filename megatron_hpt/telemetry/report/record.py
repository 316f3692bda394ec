"""What the report tells of a run's metrics: curves on a common grid, facts, and what a reader should know before."""

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
"""Of a curve; a longer run's steps are averaged in groups."""
_EVALUATED = re.compile(r"eval/.+/[a-z]+@\d+")


@dataclass(frozen=True)
class Grid:
    """Where points stand, by each of the axes that can be chosen."""

    step: list[int]
    hours: list[float]
    tokens: list[int]
    """Generated and trained."""

    def at(self, places: Sequence[int]) -> Grid:
        """Some of the points."""
        return Grid(*([column[place] for place in places] for column in (self.step, self.hours, self.tokens)))

    def plus(self, other: Grid) -> Grid:
        """These points and then the others."""
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
        """What was used up to the end of each step, cumulated."""
        seconds = _cumulated([(line.get("time/step_s") or 0.0) + (line.get("time/eval_s") or 0.0) for line in self.lines])
        tokens = _cumulated([(line.get("rollout/tokens") or 0) + (line.get("train/tokens") or 0) for line in self.lines])
        return Grid([line["step"] for line in self.lines], [value / 3600 for value in seconds], tokens)

    @property
    def per_point(self) -> int:
        """Steps that are averaged into one point of a curve."""
        return -(-len(self.lines) // MOST_POINTS)

    @cached_property
    def grid(self) -> Grid:
        """Where the points of a curve stand: at the end of each `per_point` steps, and of the last."""
        ends = [min(first + self.per_point, len(self.lines)) - 1 for first in range(0, len(self.lines), self.per_point)]
        return self.spent.at(ends)

    def curve(self, key: str) -> list[float | None]:
        """A metric on the grid; None where no step of the point has a value."""
        groups = (self.lines[first : first + self.per_point] for first in range(0, len(self.lines), self.per_point))
        values = ([value for line in group if (value := line.get(key)) is not None] for group in groups)
        return [sum(there) / len(there) if there else None for there in values]

    def evaluations(self, key: str) -> tuple[Grid, list[float]]:
        """An evaluation on a grid of its own, by the version that was evaluated."""
        found = [(line["eval/version"], line[key]) for line in self.lines if line.get(key) is not None]
        start = self.lines[0]["step"]
        before = Grid([start], [0.0], [0]).plus(self.spent)
        places = [min(max(version - start, 0), len(self.lines)) for version, _ in found]
        return replace(before.at(places), step=[version for version, _ in found]), [value for _, value in found]

    @property
    def evaluated(self) -> list[str]:
        """Keys of the evaluations that are shares of answers or prompts: ``eval/<set>/<measure>@<k>``."""
        return sorted({key for line in self.lines for key in line if _EVALUATED.fullmatch(key)})

    @cached_property
    def not_taken(self) -> list[int]:
        """Steps whose update was skipped."""
        return [line["step"] for line in self.lines if line.get("train/skipped")]


def read(run: RunDir, label: str) -> RunRecord:
    """A run's record.

    Raises:
        DataError: the run has no finished step yet.
    """
    lines = metrics.read(run.metrics)
    if not lines:
        raise DataError(f"{run.metrics}: no finished step to draw; wait for the first, or leave this run out")
    return RunRecord(run, label, load_yaml(run.config), lines)


def labels(runs: Sequence[RunDir]) -> list[str]:
    """Short names that tell the runs apart: those of the recipes, else of the folders, else the paths."""
    paths = [run.path.resolve() for run in runs]
    common = Path(os.path.commonpath(paths)) if len(paths) > 1 else paths[0].parent
    options = (
        [load_yaml(run.config).name for run in runs] if len(runs) > 1 else [paths[0].name],
        [path.name for path in paths],
        [str(path.relative_to(common)) for path in paths],
    )
    return next((names for names in options if len(set(names)) == len(names)), options[-1])


def facts(record: RunRecord) -> dict[str, str]:
    """What one wants to know first."""
    lines, config = record.lines, record.config
    folder = record.run.path.resolve().name
    found = {
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
        found[evaluation_title(key)] = _from_to([line.get(key) for line in lines], ".3f")
    mismatch = [value for line in lines if (value := line.get("mismatch/k3_kl")) is not None]
    found["largest mismatch (k3 KL)"] = f"{max(mismatch):.2g}" if mismatch else "not measured"
    found["steps not taken"] = str(len(record.not_taken))
    found["tokens generated"] = f"{sum(line.get('rollout/tokens') or 0 for line in lines):,}"
    found["tokens trained"] = f"{sum(line.get('train/tokens') or 0 for line in lines):,}"
    found["time"] = duration(record.spent.hours[-1] * 3600)
    return found


def evaluation_title(key: str) -> str:
    """For people: ``eval/heldout/avg@8`` is "heldout avg@8"."""
    return key.removeprefix("eval/").replace("/", " ")


def _from_to(values: Sequence[float | None], form: str) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "not measured"
    ends = f"{there[0]:{form}} → {there[-1]:{form}}"
    return ends if max(there) in (there[0], there[-1]) or len(there) < 3 else f"{ends} (highest {max(there):{form}})"


def notes(record: RunRecord) -> list[str]:
    """What a reader should know before the curves."""
    return list(_notes(record))


def _notes(record: RunRecord) -> Iterator[str]:
    done, wanted, taken = len(record.lines), record.config.trainer.steps, record.not_taken
    if done < wanted:
        yield f"{done} of {wanted} steps are finished: the run goes on, or ended early."
    if taken:
        shown = ", ".join(map(str, taken[:8])) + (" …" if len(taken) > 8 else "")
        reasons = sorted({line["train/skip_reason"] for line in record.lines if line.get("train/skip_reason")})
        yield f"{len(taken)} of the steps were not taken (step {shown}): {'; '.join(reasons[:3]) or 'no reason recorded'}"
    if not record.evaluated:
        yield "Nothing was evaluated on held-out problems (evaluation.sets)."
    if record.per_point > 1:
        yield f"A point of a curve is the mean of {record.per_point} steps."


def differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, with each run's value."""
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
