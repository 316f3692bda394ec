"""The trainer process: one rank of the actor, started by torchrun (``python -m megatron_hpt.actor.trainer``)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hpt.actor import checkpoint, export, guard, parallel, platform
from megatron_hpt.actor.microbatch import MicroBatchLayout
from megatron_hpt.actor.model import policy, routing
from megatron_hpt.actor.model.precision import check_fp8, this_machine, token_multiple
from megatron_hpt.actor.optimizer import optimizer
from megatron_hpt.actor.optimizer.offload import Offload
from megatron_hpt.actor.state import Actor
from megatron_hpt.actor.train_step import train_step
from megatron_hpt.actor.waiting import Waiting
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.packing import attention_parity
from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.config import Config
from megatron_hpt.engines import registry
from megatron_hpt.files import whole, write_whole
from megatron_hpt.models.checkpoints import incompleteness, read_best, remove, superseded
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.objective import algorithms
from megatron_hpt.overrides import load_yaml
from megatron_hpt.process import die_with_parent, ends_in_words, log_to
from megatron_hpt.run import RunDir
from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender

logger = logging.getLogger(__name__)


def build_actor(config: Config) -> Actor:
    """The actor of this rank, with the weights of `config.model.path`; joins the process group."""
    where = platform.detect(config.actor.threads)
    check_fp8(config.actor.fp8, config.model.dtype, this_machine())
    ranks = parallel.initialize(config.parallel, where, config.trainer.seed, config.deadlines.step_s)
    shape = run_shape(config)
    algorithm = algorithms.of_run(config)
    wrapped = optimizer.wrap(policy.load(config.model.path, config, ranks, where), config.actor.fp8_param_gather)
    for chunk in wrapped:
        chunk.train()
    routing.install([chunk.module for chunk in wrapped], ranks)
    reference = None
    if algorithm.kl is not None:
        path = config.algorithm.kl.reference or config.model.path
        reference = [chunk.requires_grad_(False).eval() for chunk in policy.load(path, config, ranks, where)]
    megatron = optimizer.build(config.optimizer, wrapped, where)
    return Actor(
        config=config,
        algorithm=algorithm,
        vocab=shape.vocab,
        wrapped=wrapped,
        optimizer=megatron,
        ranks=ranks,
        platform=where,
        cut=MicroBatchLayout(
            config.parallel.row_multiple,
            config.parallel.batch_multiple * token_multiple(config.actor.fp8),
            ranks.context.size,
            ranks.context.rank,
            equal=config.parallel.virtual_pipeline > 1,
            routers=(shape.layers, shape.experts_per_token, shape.experts) if shape.experts else (0, 0, 0),
        ),
        attention_parity=attention_parity(
            shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, shape.experts_per_token or 1
        ),
        reference=reference,
        offload=Offload(config.actor.offload, wrapped, megatron, reference or (), shared=config.rollout.sleep),
        entropy_coefficient=algorithm.entropy.coefficient,
    )


class Trainer:
    """The main loop of one rank."""

    def __init__(self, run: RunDir, board: Blackboard, start: int) -> None:
        self._run, self._board, self._start = run, board, start
        self._config = load_yaml(run.config)
        self._folder = run.actor_model(self._config)
        self._ledger = Ledger(run.batches)
        self._targets = self._await_room()
        self._actor = build_actor(self._config)
        self._saver = checkpoint.Saver(self._actor.platform, self._folder)
        if start:
            with self._actor.offload.optimizer():
                state = checkpoint.load(run.checkpoint(start), self._actor.chunks, self._actor.optimizer, self._actor.platform)
            self._actor.entropy_coefficient = state.get("entropy_coefficient", self._actor.entropy_coefficient)
            self._actor.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self._has_measured = False
        self._sender = self._make_sender()
        deadline = self._config.deadlines.rollout_s
        self._waiting = Waiting(board, self._actor.ranks.is_lead, self._sender, deadline)

    def run(self) -> None:
        """Train every step from the start, publish every version, save, export.

        Engines on the same GPUs (rollout.sleep) have the memory while this rank waits for a batch.
        """
        config = self._config
        self._publish(self._start)
        for step in range(self._start, config.trainer.steps):
            self._actor.offload.sleep()
            is_batch = self._waiting.until(f"batch/{step}")
            self._take_memory()
            if not is_batch:
                return self._stop(step)
            started = time.monotonic()
            metrics: dict[str, Any] = train_step(self._actor, self._ledger.read(step).rows, step)
            metrics["time/train_s"] = time.monotonic() - started
            self._check_first(step, metrics["mismatch/k3_kl"])
            self._keep_if_skipped(step, metrics)
            self._saver.finish(wait=False)
            self._maybe_save(step + 1)
            self._tell(f"trained/{step}", metrics)
            self._publish(step + 1)
        self._finish_saving()
        # An engine may die under the last evaluation too; a notice does not end it, since the run ends with it.
        self._waiting.until("evaluated", heeds_notice=False)
        self._take_memory()
        if config.trainer.export:
            shape = run_shape(config)
            export.export_hf(
                self._folder, self._run.export, policy.contributed_views(self._actor.chunks, shape, self._actor.ranks)
            )
            if self._actor.ranks.is_lead:
                self._run.note_export(config.trainer.steps)
        self._remove_superseded()  # the last evaluation may have chosen another checkpoint
        self._sender.close()

    def _await_room(self) -> list[Target]:
        """Wait for engines on the same GPUs: they start alone, because they measure what is free, and then sleep.

        Returns:
            The engines; none yet, where this rank may load meanwhile.
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

    def _make_sender(self) -> WeightSender:
        config, shape = self._config, run_shape(self._config)
        self._tell(ready("trainer"), True)
        return WeightSender(
            policy.views(self._actor.chunks, shape, self._actor.ranks),
            shape,
            self._targets or self._await_engines(),
            dist.group.WORLD,
            TransferOptions.of_run(config),
        )

    def _take_memory(self) -> None:
        """Nobody samples until the next version."""
        self._sender.sleep()
        self._actor.offload.wake()

    def _publish(self, version: int) -> None:
        """Send a version, unless its batch is in the ledger already: then nobody will sample from it.

        The last version is always sent: the final evaluation samples from it.
        """
        started, steps = time.monotonic(), {"weights/bytes": 0}
        if version == self._config.trainer.steps or not self._ledger.has(version):
            steps = self._sender.publish(version)
            self._actor.offload.sleep()  # caches take the memory that this rank needs for a step
            self._sender.serve()
        self._tell(f"published/{version}", {"time/transfer_s": time.monotonic() - started, **steps})

    def _stop(self, step: int) -> None:
        """Save what has been trained and say so; the supervisor ends the run."""
        if step > self._start:
            self._save(step)
        self._finish_saving()
        self._tell("stopped", step)
        self._sender.close()

    def _maybe_save(self, step: int) -> None:
        every, last = self._config.trainer.save_every, self._config.trainer.steps
        if step == last or (every and step % every == 0):
            self._save(step)

    def _save(self, step: int) -> None:
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
        if self._actor.ranks.is_lead:
            trainer = self._config.trainer
            kept = (trainer.keep_checkpoints, trainer.keep_every, read_best(self._run.path))
            whole_ones = [step for step in self._run.checkpoint_steps() if incompleteness(self._run.checkpoint(step)) is None]
            for step in superseded(whole_ones, *kept):
                remove(self._run.checkpoint(step))

    def _check_first(self, step: int, k3: float | None) -> None:
        """Of the first batch with rollouts; nothing has been saved since the start."""
        if k3 is None or self._has_measured:
            return
        self._has_measured = True
        config = self._config
        is_fp8 = config.actor.fp8 != "none" or TransferOptions.of_run(config).fp8 is not None
        guard.check_first(config, run_shape(config).experts > 0, is_fp8, step, k3)

    def _keep_if_skipped(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep the batch of a step that was not taken, and stop when there are too many in a row."""
        reason = metrics["train/skip_reason"]
        if reason is None:
            return
        logger.warning("step %d was not taken: %s", step, reason)
        if self._actor.ranks.is_lead and reason != guard.EMPTY:
            kept = self._run.skipped / self._ledger.path(step).name
            with whole(kept) as temporary:
                shutil.copyfile(self._ledger.path(step), temporary)
            write_whole(kept.with_suffix(".json"), json.dumps(metrics, indent=1))
        guard.check(self._actor, step, reason)

    def _tell(self, key: str, value: Any) -> None:
        if self._actor.ranks.is_lead:
            self._board.put(key, value)


def main() -> None:
    """Command line of one rank."""
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
