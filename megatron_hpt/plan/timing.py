"""Seconds and bytes of one step, from shape, layout and a cluster's peaks. Pure; no torch.

A roofline: what a part computes or moves, over the peak times one stated share of it. The shares are the same for every
model, layout and published row that docs/plan.md compares them with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.memory import (
    GRADIENT_BYTES,
    ITEM_BYTES,
    EngineMemory,
    active_parameters,
    engine_weights,
    optimizer_bytes,
    stage_parameters,
)

MATMUL = {"float32": 0.75, "bfloat16": 0.75, "fp8": 0.55}
"""Of the peak in matrix products. Large ones reach 0.80 in bfloat16 (tools/gpu_checks), a model's somewhat less. FP8's
accumulate their gradients in more steps (Transformer Engine's split accumulator) and reach a smaller share."""
ATTENTION = 0.5
"""Of the peak in flash attention, of the FLOPs under the causal mask. FlashAttention-3 (arXiv 2407.08608) reports up to 0.75
forward without a mask; causal masks and backward passes are slower."""
MEMORY = 0.8
"""Of the bandwidth of GPU memory in elementwise operations and decoding."""
LINK = 0.75
"""Of a link's bandwidth in collectives (NCCL's ring at large messages)."""
LAUNCH_S = 60e-6
"""Of a layer's kernels in one decoding step without CUDA graphs: about 12, 5 · 10^-6 s each."""
LATENCY_S = 15e-6
"""Of one small all-reduce of an engine's ranks."""
OPTIMIZER_PASSES = 2.5
"""Adam reads gradient, main weight and moments and writes all but the first: bytes moved over bytes of state."""


@dataclass(frozen=True)
class StepSize:
    """What one step trains and generates."""

    rows: int
    """Trained rows."""
    row_tokens: float
    """Mean of prompt and response together."""
    micro_batches: int
    """Of each data parallel rank."""
    micro_batch_tokens: float
    """Mean of one micro-batch, over its context parallel ranks."""

    @property
    def tokens(self) -> float:
        """Trained, prompts included."""
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class Pass:
    """Seconds of forward and backward pass of one micro-batch on a rank of the slowest stage."""

    products: float
    attention: float
    elementwise: float
    output: float
    """The output layer, its log-probabilities and their gradient."""
    tensor: float
    """Messages of tensor parallel ranks; none of them hides behind computation."""
    context: float
    expert: float
    pipeline: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(astuple(self))


def micro_batch_s(shape: ModelShape, config: Config, cluster: ClusterConfig, tokens: float, row: float) -> Pass:
    """Of the slowest stage, the last.

    Args:
        tokens: of the micro-batch, over all context parallel ranks.
        row: mean tokens of a row.
    """
    parallel, peak = config.parallel, Peaks(config, cluster)
    mine, layers = tokens / parallel.context, shape.layers / parallel.pipeline
    forwards = 1 + (config.actor.recompute == "full") + bool(config.algorithm.kl.coefficient)
    weights, output = active_parameters(shape)
    passes = forwards + 2  # a backward pass is two products for each of a forward pass
    sent = message_bytes(shape, config, mine)
    return Pass(
        products=2 * passes * mine * weights / parallel.pipeline / parallel.tensor / peak.products,
        attention=2 * passes * layers * shape.heads * shape.head_dim * mine * row / parallel.tensor / peak.attention,
        elementwise=passes * mine * layers * _elementwise_bytes(shape, config) / peak.memory,
        output=8 * mine * output / parallel.tensor / peak.output,
        tensor=sent.tensor / peak.ring(1, parallel.tensor),
        context=sent.context / peak.link(parallel.tensor * parallel.context),
        expert=sent.expert / peak.link(parallel.expert * (parallel.expert_tensor or parallel.tensor)),
        pipeline=sent.pipeline / peak.link(parallel.ranks),
    )


class Peaks:
    """What the cluster reaches for one recipe, per second."""

    def __init__(self, config: Config, cluster: ClusterConfig) -> None:
        gpu, dtype = cluster.gpu, config.model.dtype
        rate = {name: tflops * 1e12 * MATMUL[name] for name, tflops in gpu.tflops.items()}
        self.products = rate["fp8" if config.actor.fp8 != "none" else dtype]
        self.output = rate[dtype]
        self.attention = gpu.tflops[dtype] * 1e12 * ATTENTION
        self.memory = gpu.memory_gbs * 1e9 * MEMORY
        self.host = gpu.host_gbs * 1e9 * LINK
        self.node = gpu.link_gbs * 1e9 * LINK
        self.network = cluster.network_gbs * 1e9 * LINK
        self.storage = cluster.storage_gbs * 1e9
        self._size = cluster.gpus_per_node

    def link(self, extent: int) -> float:
        """Bytes/s from one rank to another of a group that spans so many neighbouring ranks: in a node, or between nodes."""
        return self.node if extent <= self._size else self.network

    def ring(self, stride: int, size: int) -> float:
        """Bytes/s of one rank in a collective of `size` ranks, every `stride`-th: all its members on a node have a port each,
        and the ring runs through all of them."""
        if stride * size <= self._size:
            return self.node
        return min(self.node, self.network * max(1, self._size // stride))


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank of the last stage sends for one micro-batch, forward and backward."""

    tensor: float
    context: float
    expert: float
    pipeline: float


def message_bytes(shape: ModelShape, config: Config, tokens: float) -> Messages:
    """Of one rank.

    Tensor parallel ranks gather and scatter (or all-reduce, which is both) around attention and around the feed-forward
    network in every pass, and gather once more for the gradients of weights under sequence parallelism. Context parallel
    ranks pass keys and values on, and back with their gradients. A token travels to its experts and back.

    Args:
        tokens: of the micro-batch on this context parallel rank.
    """
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    layers, hidden = shape.layers / parallel.pipeline, item * shape.hidden * tokens
    forwards = 1 + (config.actor.recompute == "full") + bool(config.algorithm.kl.coefficient)
    around = 4 * (forwards + 1) + (2 if parallel.sequence else 0)
    keys = 2 * shape.kv_heads * shape.head_dim / parallel.tensor * item * tokens
    share = 1 / parallel.tensor if parallel.sequence else 1.0
    return Messages(
        tensor=layers * around * hidden * (parallel.tensor - 1) / parallel.tensor,
        context=layers * (forwards + 2) * keys * (parallel.context - 1),
        expert=layers * 2 * (forwards + 1) * shape.experts_per_token * hidden * share * (1 - 1 / parallel.expert),
        pipeline=2 * parallel.virtual_pipeline * hidden * share if parallel.pipeline > 1 else 0,
    )


def _elementwise_bytes(shape: ModelShape, config: Config) -> float:
    """Memory traffic of one layer's elementwise operations in a forward pass, for one token on one rank: two norms and two
    residual sums (10 · hidden), the rotation (4 · heads), the gate (5 · ffn); under FP8 each product's input is read and
    written once more, in one byte and transposed."""
    parallel = config.parallel
    hidden = shape.hidden / (parallel.tensor if parallel.sequence else 1)
    heads = (shape.heads + shape.kv_heads) * shape.head_dim / parallel.tensor
    inner = (shape.experts_per_token or 1) * shape.ffn / (parallel.expert_tensor or parallel.tensor)
    casts = 4 * (2 * hidden + heads + inner) if config.actor.fp8 != "none" else 0
    return ITEM_BYTES[config.model.dtype] * (10 * hidden + 4 * heads + 5 * inner) + casts


@dataclass(frozen=True)
class StepTime:
    """Seconds of training one batch."""

    passes: float
    """Forward and backward passes of all micro-batches."""
    bubble: float
    """Ranks wait for the pipeline to fill and to drain."""
    reduce: float
    """Gradients over data parallel ranks, and the new weights back."""
    optimizer: float
    offload: float
    """Optimizer state from host memory and back."""

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(astuple(self))


def train_s(shape: ModelShape, config: Config, cluster: ClusterConfig, batch: StepSize) -> StepTime:
    """Of one batch, without the transfer."""
    parallel, peak = config.parallel, Peaks(config, cluster)
    one = micro_batch_s(shape, config, cluster, batch.micro_batch_tokens, batch.row_tokens).total
    last = parallel.pipeline - 1
    state = optimizer_bytes(shape, config, last)
    return StepTime(
        passes=batch.micro_batches * one,
        bubble=last / parallel.virtual_pipeline * one,
        reduce=reduce_bytes(shape, config) / peak.ring(parallel.tensor, parallel.context * parallel.data),
        optimizer=OPTIMIZER_PASSES * state / peak.memory,
        offload=2 * state / peak.host if config.actor.offload != "none" else 0.0,
    )


def reduce_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes that one rank sends for a step: gradients scattered in float32, weights gathered."""
    parallel = config.parallel
    replicas = parallel.data * parallel.context
    held = stage_parameters(shape, parallel, parallel.pipeline - 1).total
    return held * (GRADIENT_BYTES + ITEM_BYTES[config.model.dtype]) * (replicas - 1) / replicas


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


def flops_per_token(shape: ModelShape, length: int) -> float:
    """Of forward and backward pass without recomputation: 6 a weight of a matrix product, and causal attention.

    Attention: 12 · layers · heads · head_dim · length a token for the whole square (arXiv 2204.02311, appendix B), half of
    it under the causal mask.
    """
    width = shape.heads * shape.head_dim
    attention = shape.hidden * (width + 2 * shape.kv_heads * shape.head_dim) + width * shape.hidden
    weights = shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden
    return 6 * weights + 6 * shape.layers * width * length
