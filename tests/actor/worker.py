"""One rank of the real actor, without engines: trains batches of a ledger and reports. Started by run_ranks.

usage: worker.py CONFIG.yaml LEDGER OUT FIRST LAST [--load CHECKPOINT] [--save CHECKPOINT]
"""

import argparse
import json
from pathlib import Path

import torch.distributed as dist

from megatron_hpt.actor import checkpoint, export, parallel
from megatron_hpt.actor.model import policy
from megatron_hpt.actor.state import Actor, build_actor
from megatron_hpt.actor.train_step import accumulate, train_step
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.overrides import load_yaml


def write_gradients(actor: Actor, rows, out: Path) -> dict[str, float]:
    """The gradient under Hugging Face names, gathered from all ranks; returns the loss and its parts."""
    sums, _ = accumulate(actor, rows)
    for buffer in (b for chunk in actor.wrapped for b in chunk.buffers + chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:  # every data parallel rank holds the sum of its own shard
            shards = bucket.grad_data.chunk(group.size())
            dist.all_gather([shard for shard in shards], shards[group.rank()].clone(), group=group)
    shape = run_shape(actor.config)
    gradients = policy.contributed_views(actor.chunks, shape, actor.ranks, of=lambda parameter: parameter.main_grad)
    export.export_hf(hf_side(actor.config.model.path), out, gradients)
    return sums


def probe(actor: Actor, ledger: Ledger, out: Path) -> list[dict[str, float]]:
    """Loss and gradient of the last batch after one and after three optimizer steps."""
    sums = []
    for step in range(3):
        train_step(actor, ledger.read(step).rows, step)
        if step in (0, 2):
            sums.append(write_gradients(actor, ledger.read(2).rows, out / f"after_{step + 1}"))
    return sums


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("config", "ledger", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--gradients", action="store_true", help="export the first batch's gradient, train nothing")
    parser.add_argument("--each", action="store_true", help="export every batch's gradient, train nothing")
    parser.add_argument("--probe", action="store_true", help="train 3 steps, export gradients after 1 and 3 of them")
    arguments = parser.parse_args()
    config = load_yaml(arguments.config)
    actor = build_actor(config)
    gpt = actor.chunks
    ledger = Ledger(arguments.ledger)
    if arguments.load:
        with actor.offload.optimizer():
            assert checkpoint.load(arguments.load, gpt, actor.optimizer, actor.platform)["step"] == arguments.first
    if arguments.gradients:
        finish(actor, [write_gradients(actor, ledger.read(arguments.first).rows, arguments.out / "hf")], arguments.out)
        return
    if arguments.each:
        steps = range(arguments.first, arguments.last)
        finish(actor, [write_gradients(actor, ledger.read(s).rows, arguments.out / f"batch_{s}") for s in steps], arguments.out)
        return
    if arguments.probe:
        finish(actor, probe(actor, ledger, arguments.out), arguments.out)
        return
    steps = range(arguments.first, arguments.last)
    metrics = []
    for step in steps:
        metrics.append(train_step(actor, ledger.read(step).rows, step))
        freed = actor.offload.sleep()
        assert bool(freed) == (config.actor.offload == "all")
        actor.offload.wake()
    if arguments.save:
        with actor.offload.optimizer():
            saver = checkpoint.Saver(actor.platform, hf_side(config.model.path))
            saver.save(arguments.save, arguments.last, gpt, actor.optimizer)
            saver.finish()
    shape = run_shape(config)
    export.export_hf(hf_side(config.model.path), arguments.out / "hf", policy.contributed_views(gpt, shape, actor.ranks))
    finish(actor, metrics, arguments.out)


def finish(actor: Actor, metrics: list[dict], out: Path) -> None:
    if actor.ranks.is_lead:
        (out / "metrics.json").write_text(json.dumps(metrics))
    parallel.shutdown()


if __name__ == "__main__":
    main()
