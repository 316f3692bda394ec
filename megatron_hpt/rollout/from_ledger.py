"""The coordinator of a run that trains another run's ledger (``train --from-ledger``): nothing is sampled and evaluated."""

from __future__ import annotations

import time
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.overrides import load_yaml
from megatron_hpt.run import RunDir
from megatron_hpt.telemetry.metrics import MetricsLog, step_line


def coordinate(run: RunDir, board: Blackboard, start: int) -> None:
    """Give the trainer one batch of the ledger after the other, and write a line of metrics for each.

    It speaks to the trainer as `coordinator.Coordinator` does (its docstring has the keys), and needs neither the data nor the
    tokenizer nor the graders of the run that made the ledger.

    Raises:
        DataError: a batch of the ledger cannot be read.
        DeadlineError: the trainer is late.
    """
    config, ledger, metrics = load_yaml(run.config), Ledger(run.batches), MetricsLog(run, start)
    board.put(ready("coordinator"), True)
    board.wait(f"published/{start}", config.deadlines.startup_s, "the trainer")
    for step in range(start, config.trainer.steps):
        begun = time.monotonic()
        batch = ledger.read_meta(step)[1]
        board.put(f"batch/{step}", True)
        trained = board.wait(f"trained/{step}", config.deadlines.step_s, "the trainer")
        published = board.wait(f"published/{step + 1}", config.deadlines.step_s, "the trainer")
        metrics.write(_line(step, batch, {**trained, **published}, time.monotonic() - begun))
    metrics.close()
    board.put("evaluated", True)


def _line(step: int, batch: dict[str, Any], trained: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A step's line of metrics: of the rollouts as they were made, without the evaluations of the other run's weights."""
    made = {key: value for key, value in batch.items() if not key.startswith("eval/") and key != "time/eval_s"}
    return step_line(step, {**made, **trained, "time/step_s": seconds})
