"""The trainer process: one rank of the actor, started by torchrun (``python -m megatron_hpt.actor.trainer``).

A step: wait until the coordinator has written a batch to the ledger, take the GPU memory back from engines that share it,
train the batch or skip it (`train_step`), save a checkpoint where one is due, report the metrics, and send the new weights
to the engines, which sample the batches to come.

Keys of the blackboard that all ranks wait for:
    ``engines`` (the supervisor's): URLs of the engines that listen.
    ``asleep`` (rank 0's): engines that share the GPUs have given up their memory, so the model may be built.
    ``batch/<step>`` (the coordinator's): the step's batch is in the ledger.
    ``scored/<version>`` (the coordinator's): the version has been evaluated, where `Config.evaluates` it.
    ``evaluated`` (the coordinator's): the last evaluation has ended.
    ``notice`` (the supervisor's), and keys about engines that died: see `waiting`.
Keys that rank 0 writes, besides those of `waiting`:
    ``ready/trainer``: the model is loaded; the supervisor waits for it.
    ``published/<version>``: the engines that sample have the weights of so many steps; seconds and bytes of the transfer.
    ``trained/<step>``: the step's metrics, for the coordinator.
    ``stopped``: how many steps were done when a notice ended training, for the supervisor.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hpt.actor import checkpoint, export, guard, parallel
from megatron_hpt.actor.model import policy
from megatron_hpt.actor.state import build_actor
from megatron_hpt.actor.train_step import train_step
from megatron_hpt.actor.waiting import Waiting
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Row
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.engines import registry
from megatron_hpt.files import whole, write_whole
from megatron_hpt.models.checkpoints import incompleteness, read_best, remove, superseded
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.overrides import load_yaml
from megatron_hpt.process import die_with_parent, ends_in_words, log_to
from megatron_hpt.run import RunDir
from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender
from megatron_hpt.transfer.sending.no_engines import NoEngines

logger = logging.getLogger(__name__)


class Trainer:
    """The main loop of one rank; every rank runs it, and all of it is collective."""

    def __init__(self, run: RunDir, board: Blackboard, start: int) -> None:
        """Build the actor, load the checkpoint that training goes on from, and plan the weight transfer.

        Args:
            start: optimizer steps that are done; above 0 there is a checkpoint of that step.
        """
        self._run, self._board, self._start = run, board, start
        self._config = load_yaml(run.config)
        self._folder = run.actor_model(self._config)
        self._ledger = Ledger(run.batches)
        self._needed = self._oldest_needed()
        self._targets = self._await_sleeping_engines()
        self._actor = build_actor(self._config)
        self._saver = checkpoint.Saver(self._actor.platform, self._folder)
        if start:
            with self._actor.offload.optimizer():
                state = checkpoint.load(run.checkpoint(start), self._actor.chunks, self._actor.optimizer, self._actor.platform)
            self._actor.entropy_coefficient = state.get("entropy_coefficient", self._actor.entropy_coefficient)
            self._actor.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._has_measured = False
        self._idle_s = 0.0
        """Seconds that this rank has waited for the coordinator in the current step."""
        self._sender = self._make_sender()
        self._waiting = Waiting(board, self._actor.ranks.is_lead, self._sender, self._config.deadlines.rollout_s)

    def run(self) -> None:
        """Train every step from the start, publish every version, and export the last; a notice ends it earlier.

        Engines on the same GPUs (rollout.sleep) have the memory while this rank waits for a batch.
        """
        self._publish(self._start)
        for step in range(self._start, self._config.trainer.steps):
            self._actor.offload.sleep()
            self._idle_s = 0.0
            has_batch = self._wait(f"batch/{step}")
            self._take_memory()
            if not has_batch:
                return self._stop(step)
            metrics = self._train(step)
            self._saver.finish(wait=False)
            self._save_if_due(step + 1)
            self._announce(f"trained/{step}", metrics)
            self._publish(step + 1)
        self._finish_saving()
        # An engine may die under the last evaluation too; a notice does not end it, since the run ends with it.
        self._waiting.until("evaluated", heeds_notice=False)
        self._take_memory()
        self._export()
        self._remove_superseded()  # the last evaluation may have chosen another checkpoint
        self._sender.close()

    def _train(self, step: int) -> dict[str, Any]:
        """Train the step's batch, and look at how it went.

        Returns:
            The step's metrics, the same on every rank.

        Raises:
            HptError: the engine samples from another distribution, or too many steps in a row were skipped (`guard`).
        """
        started = time.monotonic()
        rows = self._ledger.read(step).rows
        metrics: dict[str, Any] = train_step(self._actor, rows, step)
        metrics["time/train_s"] = time.monotonic() - started
        self._check_first_mismatch(step, metrics["mismatch/k3_kl"], rows)
        self._keep_if_skipped(step, metrics)
        return metrics

    def _oldest_needed(self) -> int:
        """Return the oldest version that a batch may be sampled from which is not in the ledger.

        All ranks find the same, because they look before a version is published, without which the coordinator makes no batch.
        """
        steps = self._config.trainer.steps
        first_missing = next((step for step in range(self._start, steps) if not self._ledger.has(step)), steps)
        return first_missing - self._config.rollout.max_lag

    def _await_sleeping_engines(self) -> list[Target]:
        """Wait until engines on the same GPUs have started and sleep; called before anything is built on the device.

        Such an engine measures how much memory is free when it starts, so it must start alone.

        Returns:
            The engines; empty where they have GPUs of their own, so that this rank builds its model while they start.
        """
        config, board = self._config, self._board
        if not (config.transfer.shares_gpus or config.rollout.sleep):
            return []
        targets = self._await_engines()
        if config.rollout.sleep:
            if os.environ["RANK"] == "0":
                for target in targets:
                    target.control.sleep()
                board.put("asleep", True)
            board.wait("asleep", config.deadlines.startup_s, "rank 0")
        return targets

    def _await_engines(self) -> list[Target]:
        config = self._config
        urls = self._board.wait("engines", config.deadlines.startup_s, "an engine")
        return [Target(registry.control(config, url), registry.layout(config)) for url in urls]

    def _make_sender(self) -> WeightSender | NoEngines:
        config, shape = self._config, run_shape(self._config)
        self._announce(ready("trainer"), True)
        targets = self._targets or self._await_engines()
        if not targets:  # the batches are those of another run's ledger
            return NoEngines()
        return WeightSender(
            policy.views(self._actor.chunks, shape, self._actor.ranks),
            shape,
            targets,
            dist.group.WORLD,
            TransferOptions.of_run(config),
        )

    def _take_memory(self) -> None:
        """Have the engines that share the GPUs give up their memory, and bring this rank's weights and gradients back."""
        self._sender.sleep()
        self._actor.offload.wake()

    def _publish(self, version: int) -> None:
        """Send a version of the weights, unless the ledger had all batches that could be sampled from it when the run began.

        The last version is always sent, because the final evaluation samples from it. The version before stays with the engines
        until it has been evaluated.
        """
        if version > self._start and self._config.evaluates(version - 1):
            self._wait(f"scored/{version - 1}", heeds_notice=False)
        started, transfer = time.monotonic(), {"weights/bytes": 0}
        if version >= self._needed or version == self._config.trainer.steps:
            transfer = self._sender.publish(version)
            self._actor.offload.sleep()  # caches take the memory that this rank needs for a step
            self._sender.serve()
        seconds = {"time/transfer_s": time.monotonic() - started, "time/trainer_idle_s": self._idle_s}
        self._announce(f"published/{version}", {**seconds, **transfer})

    def _wait(self, key: str, heeds_notice: bool = True) -> bool:
        """Wait as `Waiting.until`, and count the time among the step's idle seconds."""
        started = time.monotonic()
        came = self._waiting.until(key, heeds_notice)
        self._idle_s += time.monotonic() - started
        return came

    def _stop(self, step: int) -> None:
        """End after a notice: save what has been trained and announce it, so that the supervisor ends the run."""
        if step > self._start:
            self._save(step)
        self._finish_saving()
        self._announce("stopped", step)
        self._sender.close()

    def _save_if_due(self, step: int) -> None:
        every, last = self._config.trainer.save_every, self._config.trainer.steps
        if step == last or (every and step % every == 0):
            self._save(step)

    def _save(self, step: int) -> None:
        """Start writing a checkpoint of so many optimizer steps; training goes on meanwhile."""
        state = {
            "entropy_coefficient": self._actor.entropy_coefficient,
            "skipped_in_a_row": self._actor.skipped_in_a_row,
            "next_prompt": self._ledger.read_meta(step - 1)[1].get("data/next_prompt"),
        }
        with self._actor.offload.optimizer():
            self._saver.save(self._run.checkpoint(step), step, self._actor.chunks, self._actor.optimizer, state)
        self._remove_superseded()

    def _finish_saving(self) -> None:
        self._saver.finish()
        self._remove_superseded()

    def _remove_superseded(self) -> None:
        """Remove whole checkpoints that the settings do not keep; those that are still being written are not looked at."""
        if self._actor.ranks.is_lead:
            trainer = self._config.trainer
            kept = (trainer.keep_checkpoints, trainer.keep_every, read_best(self._run.path))
            whole_ones = [step for step in self._run.checkpoint_steps() if incompleteness(self._run.checkpoint(step)) is None]
            for step in superseded(whole_ones, *kept):
                remove(self._run.checkpoint(step))

    def _export(self) -> None:
        """Write the weights as a Hugging Face folder, where `trainer.export` asks for it."""
        config, actor = self._config, self._actor
        if not config.trainer.export:
            return
        views = policy.contributed_views(actor.chunks, run_shape(config), actor.ranks)
        export.export_hf(self._folder, self._run.export, views)
        if actor.ranks.is_lead:
            self._run.note_export(config.trainer.steps)

    def _check_first_mismatch(self, step: int, k3: float | None, rows: Sequence[Row]) -> None:
        """Look at the mismatch of the first batch with rollouts of the weights that it trains.

        That is the first one of a run, before anything has been saved; older weights differ by what has been learnt since.
        """
        if k3 is None or self._has_measured or any(row.policy_version not in (step, None) for row in rows):
            return
        self._has_measured = True
        config = self._config
        is_fp8 = config.actor.fp8 != "none" or TransferOptions.of_run(config).fp8 is not None
        guard.check_first(config, run_shape(config).experts > 0, is_fp8, step, k3)

    def _keep_if_skipped(self, step: int, metrics: dict[str, Any]) -> None:
        """Copy batch and metrics of a step that was not wholly taken to ``skipped/``, and stop after too many in a row."""
        reason = metrics["train/skip_reason"]
        if reason is None:
            return
        logger.warning("step %d was %s: %s", step, "taken in part" if metrics["train/updates"] else "not taken", reason)
        if self._actor.ranks.is_lead and reason != guard.EMPTY:
            kept = self._run.skipped / self._ledger.path(step).name
            with whole(kept) as temporary:
                shutil.copyfile(self._ledger.path(step), temporary)
            write_whole(kept.with_suffix(".json"), json.dumps(metrics, indent=1))
        guard.check(self._actor, step, reason)

    def _announce(self, key: str, value: Any) -> None:
        if self._actor.ranks.is_lead:
            self._board.put(key, value)


def main() -> None:
    """Run one rank, as torchrun starts it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", required=True)
    parser.add_argument("--from-step", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent()
    run = RunDir(arguments.run)
    log_to(run.log(f"trainer_rank{os.environ['RANK']}"))
    checkpoint.start_results_process()
    with ends_in_words(run.path):
        Trainer(run, Blackboard.join(arguments.store), arguments.from_step).run()
    parallel.shutdown()
    logger.info("done")


if __name__ == "__main__":
    main()
