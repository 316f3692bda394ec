"""A trainer of one process for tests: the real sender over the tensors of a folder, without Megatron."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_hpt.config import Config
from megatron_hpt.engines import registry
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.mapping import ShardView
from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender


def group() -> dist.ProcessGroup:
    """This process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


class Trainer:
    """Weights of a folder, and a sender for them."""

    def __init__(self, config: Config, urls: list[str], deadline_s: float = 6.0, **options) -> None:
        config.deadlines.transfer_s = deadline_s
        self.kind = config.rollout.engine
        self.weights = load_file(Path(config.model.path) / "model.safetensors")
        views = [ShardView(n, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), t) for n, t in self.weights.items()]
        targets = [Target(registry.control(config, url), registry.layout(config)) for url in urls]
        options = TransferOptions(**{"deadline_s": deadline_s, **options})
        self.sender = WeightSender(views, model_shape(config.model.path), targets, group(), options)

    def scale(self, factor: float) -> None:
        for tensor in self.weights.values():
            tensor.mul_(factor)

    def close(self) -> None:
        self.sender.close()


def main() -> None:
    """trainers.py KIND MODEL URL TRANSPORT VERSION CALLS: publish, and be killed at that message or call to the engine."""
    from megatron_hpt.transfer.control import EngineControl
    from megatron_hpt.transfer.transports import collective
    from tests.engine_servers import engine_config

    kind, model, url, transport, version, last = sys.argv[1:]
    torch.set_num_threads(1)
    calls = iter(range(1000))

    def then_die(method):
        def call(*arguments, **more):
            if next(calls) == int(last):
                os.kill(os.getpid(), 9)
            return method(*arguments, **more)

        return call

    trainer = Trainer(engine_config(kind, Path(model)), [url], transport=transport)
    if transport == "gloo":
        collective.Meeting.send = then_die(collective.Meeting.send)
    else:
        EngineControl._call = then_die(EngineControl._call)
    trainer.sender.publish(int(version))


if __name__ == "__main__":
    main()
