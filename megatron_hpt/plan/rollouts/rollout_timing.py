"""How fast one server computes, and seconds of one version's way to the engines. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.engines.seeding import is_seeded
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.memory import EngineMemory, active_parameters, engine_weights
from megatron_hpt.plan.peaks import Peaks
from megatron_hpt.plan.rollouts.lengths import Lengths

EAGER_S = 60e-6
"""Of a layer's kernels in one decoding step, launched one by one: about 12 of KERNEL_S."""
GRAPH_S = 15e-6
"""The same in a CUDA graph, whose kernels follow each other within little more than a microsecond."""
LATENCY_S = 15e-6
"""Of one small all-reduce of an engine's ranks."""


@dataclass(frozen=True)
class Decoding:
    """What one server takes for a token of each of its sequences, and for a prompt."""

    weights_s: float
    """Seconds to read all weights."""
    cached_s: float
    """Seconds to read keys and values of one token."""
    sequence_s: float
    """Seconds of computing for one sequence."""
    fixed_s: float
    """Seconds of launches and of messages between ranks."""
    unused: float
    """Share of the experts' weights that one token does not need; 0 in a dense model."""
    prefill_s: float
    """Seconds to compute one token of a prompt."""
    slots: int
    """Sequences that are decoded at a time, at most."""

    def step_s(self, running: float, cached: float) -> float:
        """Return the seconds of one decoding step.

        Args:
            running: sequences that get a token.
            cached: tokens of all of them whose keys and values are read.
        """
        read = self.weights_s * (1 - self.unused**running if self.unused else 1.0) + cached * self.cached_s
        return max(read, running * self.sequence_s) + self.fixed_s


def decoding(
    shape: ModelShape, config: Config, cluster: ClusterConfig, memory: EngineMemory, item: float, lengths: Lengths
) -> Decoding:
    """Return the speed of one server on GPUs.

    Engines whose samples follow from seeds launch kernel by kernel (`engines.seeding`); others replay CUDA graphs.

    Args:
        item: bytes of a weight of a layer in the engine.
    """
    peak, tensor = Peaks(config, cluster), config.rollout.tensor_parallel
    weights, output = active_parameters(shape)
    launches = EAGER_S if is_seeded(config, on_gpus=True) else GRAPH_S
    room = int(memory.tokens / (lengths.prompt + lengths.response))
    return Decoding(
        weights_s=engine_weights(shape, tensor, item) / peak.memory,
        cached_s=memory.token / peak.memory,
        sequence_s=2 * (weights + output) / tensor / peak.output,
        fixed_s=shape.layers * (launches + (2 * LATENCY_S if tensor > 1 else 0)),
        unused=1 - shape.experts_per_token / shape.experts if shape.experts else 0.0,
        prefill_s=2 * weights / tensor / peak.output,
        slots=max(1, min(config.rollout.max_running, room)),
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
