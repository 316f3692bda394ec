"""One rank that builds the actor and says how far its weights are from those of its model's folder. Started by run_ranks.

usage: weights.py CONFIG.yaml FOLDER OUT.json [--ledger LEDGER --steps N]
"""

import argparse
import json
from pathlib import Path

from megatron_hpt.actor import parallel
from megatron_hpt.actor.model import policy
from megatron_hpt.actor.state import Actor, build_actor
from megatron_hpt.actor.train_step import train_step
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.models.hf_files import HfTensors
from megatron_hpt.overrides import load_yaml


def worst(views, files: HfTensors) -> float:
    """The largest relative error of any tensor."""
    errors = []
    for view in views:
        box = tuple(slice(start, start + size) for start, size in zip(view.offset, view.extent, strict=True))
        expected = files.get(view.name).float()[box]
        errors.append(float((view.read().float().cpu() - expected).norm() / expected.norm()))
    return max(errors)


def main_weights(actor: Actor):
    """The optimizer's float32 weight of each parameter."""
    return {
        parameter: part._get_main_param_and_optimizer_states(parameter)["param"].view(parameter.shape)
        for part in actor.optimizer.chained_optimizers
        for parameter in part.model_param_gbuf_map
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    arguments = parser.parse_args()
    config = load_yaml(arguments.config)
    actor = build_actor(config)
    shape, files = run_shape(config), HfTensors(arguments.folder)
    mains = main_weights(actor)
    found = {
        "classes": sorted({type(parameter.data).__name__ for chunk in actor.chunks for parameter in chunk.parameters()}),
        "model": worst(policy.views(actor.chunks, shape, actor.ranks), files),
        "main": worst(policy.views(actor.chunks, shape, actor.ranks, of=mains.__getitem__), files),
    }
    ledger = Ledger(arguments.ledger) if arguments.steps else None
    found["losses"] = [train_step(actor, ledger.read(step).rows, step)["train/loss"] for step in range(arguments.steps)]
    found["trained"] = worst(policy.views(actor.chunks, shape, actor.ranks), files)
    arguments.out.write_text(json.dumps(found))
    parallel.shutdown()


if __name__ == "__main__":
    main()
