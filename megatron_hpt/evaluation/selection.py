"""Which checkpoint of a run is the best on a validation set, and which evaluations keep their samples."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_hpt.config import EvaluationConfig
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
