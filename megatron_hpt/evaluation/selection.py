"""Which checkpoint of a run is the best on a validation set, and which evaluations keep their samples."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config, EvaluationConfig, files_of
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.data.source import sources
from megatron_hpt.data.storage.locations import find
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.evaluation.benchmarks import canonical
from megatron_hpt.evaluation.metrics import average_key
from megatron_hpt.models.checkpoints import BEST, Best, read_best, superseded, write_best
from megatron_hpt.run import RunDir


class Selection:
    """Keeps the best checkpoint so far. It follows from the run's lines of metrics, so a resumed run finds it again."""

    def __init__(self, run: RunDir, config: EvaluationConfig, lines: Iterable[Mapping[str, Any]]) -> None:
        """
        Args:
            lines: the metrics of the steps that a resumed run has behind it.
        """
        self._run, self._config = run, config
        self._best: Best | None = None
        there = set(run.checkpoint_steps())
        for line in lines:
            if line.get("eval/version") in there:
                self._best = self._better(line)
        self._write()

    def consider(self, metrics: Mapping[str, Any]) -> None:
        """Consider an evaluation, if the metrics have one (from the coordinator). Its checkpoint is saved or being saved."""
        better = self._better(metrics)
        if better != self._best:
            self._best = better
            self._write()

    def _better(self, metrics: Mapping[str, Any]) -> Best | None:
        """Return the best checkpoint with these metrics considered; the earliest of equally good ones. Version 0 has none."""
        select, metric = self._config.select, average_key(self._config.select or "", self._config.samples)
        value, step = metrics.get(metric), metrics.get("eval/version")
        if select is None or value is None or not step or (self._best is not None and value <= self._best.value):
            return self._best
        return Best(step, select, metric, value)

    def _write(self) -> None:
        if self._best is None:
            (self._run.path / BEST).unlink(missing_ok=True)
        else:
            write_best(self._run.path, self._best)


def remove_superseded(run: RunDir, newest: int) -> None:
    """Remove the samples of all evaluations but the last `newest` ones and that of the best checkpoint."""
    for step in superseded(run.evaluation_steps(), newest, 0, read_best(run.path)):
        shutil.rmtree(run.evaluation(step), ignore_errors=True)


def check_selection(config: Config) -> None:
    """Refuse a validation set that is a test set, or that is trained on.

    Raises:
        ConfigError: names the key.
    """
    trained = {file.resolve() for source in sources(config) for file in _files(source.path)}
    for name, paths in config.evaluation.validation.items():
        files = _files(paths)
        if known := next(filter(None, map(canonical, (name, *(file.stem for file in files)))), None):
            raise ConfigError(
                f"evaluation.validation.{name}: {known} is a test set; one that chose a checkpoint could not be reported. Put "
                "it into evaluation.sets, and problems of your own into evaluation.validation"
            )
        if shared := [file for file in files if file.resolve() in trained]:
            raise ConfigError(
                f"evaluation.validation.{name}: {shared[0]} is in data.train; choose on problems that are not trained on"
            )


def _files(paths: str | list[str]) -> list[Path]:
    """Find the files of folders and patterns too; what is not there is refused where it is read."""
    try:
        return [Path(location.path) for location in find(paths)]
    except DataError:
        return [Path(path) for path in files_of(paths)]


def check_validation(config: Config, held_out: Mapping[str, Sequence[Prompt]]) -> None:
    """Refuse a validation set that shares problems with a reported one.

    Raises:
        DataError: names both and how many.
    """
    evaluation = config.evaluation
    reported = {tuple(prompt.tokens): name for name in evaluation.sets for prompt in held_out[name]}
    for name in evaluation.validation:
        if shared := [reported[key] for prompt in held_out[name] if (key := tuple(prompt.tokens)) in reported]:
            raise DataError(
                f"evaluation.validation.{name}: {len(shared)} of its {len(held_out[name])} problems are also in "
                f"evaluation.sets.{shared[0]}, which could not be reported any more; leave them out of one of the two"
            )
