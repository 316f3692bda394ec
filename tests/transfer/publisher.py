"""Ranks of the real actor that publish to running engines from one layout after the other. Started by run_ranks.

usage: publisher.py MODEL LAYOUTS.json OUT.json KIND URL… ; of each layout first doubled weights, then the model's own.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hpt.actor import export, parallel, platform
from megatron_hpt.actor.model import policy
from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.engines import registry
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.process import die_with_parent
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.layouts import actor_holdings, held_by
from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender
from tests.engine_servers import engine_config, greedy


def build(config: Config, where: platform.Platform):
    ranks = parallel.initialize(config.parallel, where, 0, 120)
    shape = model_shape(config.model.path)
    chunks = policy.load(config.model.path, config, ranks, where)
    return shape, ranks, chunks, policy.views(chunks, shape, ranks)


def scale(views, factor: float) -> None:
    with torch.no_grad():
        for view in views:
            view.view.mul_(factor)


def main() -> None:
    die_with_parent()
    path, layouts, out, kind, *urls = sys.argv[1:]
    where, outcome, version = platform.detect(threads=1), {}, 0
    for name, layout in json.loads(Path(layouts).read_text(encoding="utf-8")).items():
        os.environ["MASTER_PORT"] = str(layout.pop("port"))  # a store for each process group
        transfer = layout.pop("transfer", {})
        config = engine_config(kind, Path(path))
        config.rollout.tensor_parallel = int(layout.pop("engine_tensor", 1))
        config.parallel = ParallelConfig(**layout)
        shape, ranks, chunks, views = build(config, where)
        # The formulae that plans are made of are what the ranks hold.
        held = actor_holdings(hf_tensor_shapes(shape), shape, config.parallel)
        assert {(v.name, Box(v.offset, v.extent)) for v in views} == set(held_by(held, ranks.rank)), name
        targets = [Target(registry.control(config, url), registry.layout(config)) for url in urls]
        options = TransferOptions(**{"compare_every": 1, **transfer})
        sender = WeightSender(views, shape, targets, dist.group.WORLD, options)
        outcome[name] = {"sent": sender.plan.sent, "received": sender.plan.received}
        for factor, key in ((2.0, "doubled"), (0.5, "own")):
            scale(views, factor)
            version += 1
            outcome[name][f"bytes_{key}"] = sender.publish(version)["weights/bytes"]
            if ranks.is_lead:
                outcome[name][key] = [greedy(kind, url) for url in urls]
        export.export_hf(path, Path(out).with_name(f"export_{version}"), policy.contributed_views(chunks, shape, ranks))
        sender.close()
        parallel.shutdown()
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main()
