"""One rank of the real actor after a training step: bytes of the tensors that it holds. Started by run_ranks.

usage: memory_worker.py CONFIG.yaml LEDGER OUT
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hpt.actor import parallel
from megatron_hpt.actor.state import build_actor
from megatron_hpt.actor.train_step import train_step
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.overrides import load_yaml


def held(tensors: Iterable[torch.Tensor], besides: set[int] = frozenset()) -> tuple[int, set[int]]:
    """Bytes of distinct storages, and which they are."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    mine = {pointer: nbytes for pointer, nbytes in storages.items() if pointer not in besides}
    return sum(mine.values()), set(mine)


def main() -> None:
    config, ledger, out = map(Path, sys.argv[1:])
    actor = build_actor(load_yaml(config))
    train_step(actor, Ledger(ledger).read(0).rows, 0)
    buffers = [b for chunk in actor.wrapped for b in chunk.buffers + chunk.expert_parallel_buffers]
    weights, of_model = held(parameter for chunk in actor.chunks for parameter in chunk.parameters())
    states = [
        value
        for part in actor.optimizer.chained_optimizers
        for parameter, state in part.optimizer.state.items()
        for value in (parameter, *state.values())
        if isinstance(value, torch.Tensor)
    ]
    found = {
        "weights": weights,
        "gradients": held(buffer.grad_data for buffer in buffers)[0],
        "optimizer": held(states, of_model)[0],
        "stage": actor.ranks.pipeline,
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if actor.ranks.is_lead:
        out.write_text(json.dumps(everyone))
    parallel.shutdown()


if __name__ == "__main__":
    main()
