"""Seconds of a step's rollouts, and of one version's way to the engines. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.memory import EngineMemory, active_parameters, engine_weights
from megatron_hpt.plan.peaks import Peaks

LAUNCH_S = 60e-6
"""Of a layer's kernels in one decoding step without CUDA graphs: about 12 of KERNEL_S."""
LATENCY_S = 15e-6
"""Of one small all-reduce of an engine's ranks."""


@dataclass(frozen=True)
class Generation:
    """Seconds of one step's rollouts."""

    prefill: float
    decode: float
    tail: float
    """The longest responses, when the others have ended."""
    running: int
    """Sequences that one server decodes at a time."""

    @property
    def total(self) -> float:
        """One after the other."""
        return self.prefill + self.decode + self.tail


def generation_s(
    shape: ModelShape,
    config: Config,
    cluster: ClusterConfig,
    memory: EngineMemory,
    item: float,
    servers: int,
    prompt: float,
    response: float,
) -> Generation:
    """All rollouts of a step over all servers; a prompt is computed once for its samples.

    Args:
        item: bytes of a weight of a layer in the engine.
        prompt, response: mean tokens.
    """
    peak, tensor = Peaks(config, cluster), config.rollout.tensor_parallel
    prompts = config.trainer.prompts_per_step
    sequences = prompts * config.rollout.samples_per_prompt / servers
    running = max(1, min(config.rollout.max_running, math.ceil(sequences), int(memory.tokens / (prompt + response))))
    weights, output = active_parameters(shape)

    def step(batch: float) -> float:
        """One token for each running sequence."""
        cache = batch * (prompt + response / 2) * memory.token
        used = 1 - (1 - shape.experts_per_token / shape.experts) ** batch if shape.experts else 1.0
        moved = (engine_weights(shape, tensor, item) * used + cache) / peak.memory
        computed = 2 * (weights + output) * batch / tensor / peak.output
        return max(moved, computed) + shape.layers * (LAUNCH_S + (2 * LATENCY_S if tensor > 1 else 0))

    return Generation(
        prefill=2 * weights * prompts / servers * prompt / tensor / peak.output,
        decode=sequences * response / running * step(running),
        tail=(config.data.max_response_length - response) * step(running / 4),
        running=running,
    )


@dataclass(frozen=True)
class Transfer:
    """One version of the weights on its way into all engines."""

    sent: float
    """Bytes that leave all trainer ranks."""
    received: float
    """Bytes that reach one engine rank."""
    seconds: float
    """On the wire."""


@dataclass(frozen=True)
class _Wire:
    """How fast a transport can be."""

    once: bool
    """One copy of a box serves all receivers."""
    rate: Callable[[Peaks, bool], float]
    """Bytes/s of one rank in each direction, from the peaks and whether both ends are on one node; of `shared`: of all."""
    shared: bool = False
    """Everything that is sent and received goes through one place."""


_WIRES = {
    "shared_memory": _Wire(True, lambda peak, near: peak.host),
    "files": _Wire(True, lambda peak, near: peak.storage, shared=True),
    "gloo": _Wire(False, lambda peak, near: peak.host if near else min(peak.host, peak.network)),
    "cuda_ipc": _Wire(True, lambda peak, near: peak.node),
    "nccl": _Wire(False, lambda peak, near: peak.node if near else peak.network),
}


def transfer(shape: ModelShape, config: Config, cluster: ClusterConfig, servers: int, item: float, near: bool) -> Transfer:
    """What `tools/weight_transfer.py plan` works out box by box, as its lower bound: its senders are within 3 % of their mean.

    Args:
        item: bytes of a weight of a layer in the engine.
        near: trainer and engines are on one node.
    """
    width, wire = config.rollout.tensor_parallel, _WIRES[config.transfer.transport]
    received, rate = engine_weights(shape, width, item), wire.rate(Peaks(config, cluster), near)
    arriving = received * width * servers
    sent = engine_weights(shape, 1, item) if wire.once else arriving
    seconds = (sent + arriving if wire.shared else max(sent / config.parallel.ranks, received)) / rate
    return Transfer(sent, received, seconds)
