"""Seconds and bytes of a training step, from shape, layout and a cluster's peaks (plan/peaks.py). Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.flags import Flags, Load, tensor_messages, visible
from megatron_hpt.plan.memory import (
    GRADIENT_BYTES,
    ITEM_BYTES,
    active_parameters,
    embedding_rows,
    optimizer_bytes,
    stage_parameters,
    weight_bytes,
)
from megatron_hpt.plan.peaks import KERNEL_S, Peaks

TILE_ROWS, TILE_COLUMNS = 128, 256
"""Of a matrix product's result that one multiprocessor computes at a time (CUTLASS's largest tile for Hopper)."""
EXPERT_KERNELS = 3
"""Of an expert in a pass that computes its experts one after the other: two products and the gate."""
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
    """Of each data parallel rank, in all optimizer steps together."""
    micro_batch_tokens: float
    """Mean of one micro-batch, over its context parallel ranks."""
    attended_tokens: float
    """Mean length of the row that a token is in, on which the cost of its attention depends."""
    updates: int = 1
    """Optimizer steps."""

    @property
    def tokens(self) -> float:
        """Trained, prompts included."""
        return self.rows * self.row_tokens

    @property
    def micro_batches_of_update(self) -> int:
        """Of each data parallel rank, in one optimizer step."""
        return self.micro_batches // self.updates


@dataclass(frozen=True)
class Pass:
    """Seconds of forward and backward pass of one micro-batch on a rank of the slowest stage."""

    products: float
    experts: float
    """Their matrix products."""
    attention: float
    elementwise: float
    output: float
    """The output layer, its log-probabilities and their gradient."""
    tensor: float
    """Of the messages from here on: what computation does not hide."""
    context: float
    expert: float
    pipeline: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(vars(self).values())


def micro_batch_s(
    shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, micro_batches: int, tokens: float, row: float
) -> Pass:
    """Return what the slowest stage, the last, takes.

    Args:
        micro_batches: of a data parallel rank, in one optimizer step.
        tokens: of the micro-batch, over all context parallel ranks.
        row: mean length of the row that a token is in.
    """
    parallel, peak = config.parallel, Peaks(config, cluster, flags.hopper_attention)
    mine, layers = tokens / parallel.context, shape.layers / parallel.pipeline
    passes = forward_passes(config) + 2  # a backward pass is two products for each of a forward pass
    dense, output = active_parameters(shape)
    dense -= shape.layers * shape.experts_per_token * 3 * shape.hidden * shape.ffn
    moved = passes * mine * _elementwise_bytes(shape, config, flags) + (0 if flags.gradients else _added_bytes(shape, config))
    computed = {
        "products": 2 * passes * mine * dense / parallel.pipeline / parallel.tensor / peak.products,
        "experts": layers * _experts_s(shape, config, cluster, flags, mine) if shape.experts else 0.0,
        "attention": 2 * passes * layers * shape.heads * shape.head_dim * mine * row / parallel.tensor / peak.attention,
        "elementwise": layers * moved / peak.memory,
    }
    sent = message_bytes(shape, config, mine)
    alone = {
        "tensor": sent.tensor / peak.ring(1, parallel.tensor),
        "context": sent.context / peak.link(parallel.tensor * parallel.context),
        "expert": sent.expert / peak.exchange(parallel.expert_tensor_ranks, parallel.expert),
        "pipeline": sent.pipeline / peak.link(parallel.ranks),
    }
    load = _load(shape, config, micro_batches)
    return Pass(
        **computed,
        output=8 * mine * output / parallel.tensor / peak.output,
        **{part: visible(part, seconds, computed, flags, load) for part, seconds in alone.items()},
    )


def optimizer_steps(config: Config) -> int:
    """Return how many optimizer steps a batch makes that has prompts enough."""
    return config.trainer.updates_per_batch * config.trainer.epochs_per_batch


def slowest_pass(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, batch: StepSize) -> Pass:
    """Return what the slowest stage takes for a micro-batch of a step."""
    count, tokens = batch.micro_batches_of_update, batch.micro_batch_tokens
    return micro_batch_s(shape, config, cluster, flags, count, tokens, batch.attended_tokens)


def forward_passes(config: Config) -> float:
    """Return how often a micro-batch runs forward each time that it is trained: once, and for recomputation and other policies.

    The reference policy computes it once for all epochs, and so does the trainer's own where it is π_old of several updates.
    """
    old = config.algorithm.old_policy == "trainer" and optimizer_steps(config) > 1
    others = (bool(config.algorithm.kl.coefficient) + old) / config.trainer.epochs_per_batch
    return 1 + (config.actor.recompute == "full") + others


def _load(shape: ModelShape, config: Config, micro_batches: int) -> Load:
    held = stage_parameters(shape, config.parallel, config.parallel.pipeline - 1).total
    return Load(config.parallel, forward_passes(config), micro_batches, held)


def _experts_s(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, tokens: float) -> float:
    """Return the seconds of the products of one layer's experts on a rank, whose tokens are spread evenly.

    A product fills whole tiles, and one that is launched alone fills whole waves of the GPU's multiprocessors. Each reads
    its weights once a pass, or adds to their float32 gradients.
    """
    parallel, peak = config.parallel, Peaks(config, cluster)
    width = parallel.expert_tensor_ranks
    experts = shape.experts // parallel.expert
    rows = tokens / parallel.tensor * parallel.expert * width * shape.experts_per_token / shape.experts
    weights = 3 * shape.hidden * shape.ffn / width
    launched = experts if flags.grouped else 1
    tiles = math.ceil(rows / TILE_ROWS) * math.ceil((2 * shape.ffn / width + shape.hidden) / TILE_COLUMNS)
    waves = math.ceil(launched * tiles / cluster.gpu.multiprocessors) * cluster.gpu.multiprocessors / (launched * tiles)
    product = 2 * math.ceil(rows / TILE_ROWS) * TILE_ROWS * weights * waves / peak.products
    item = 1 if config.actor.fp8 != "none" else ITEM_BYTES[config.model.dtype]

    def a_pass(moved: float) -> float:
        return max(launched * max(product, weights * moved / peak.memory), EXPERT_KERNELS * KERNEL_S) * experts / launched

    return (forward_passes(config) + 1) * a_pass(item) + a_pass(2 * GRADIENT_BYTES)


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank of the last stage sends for one micro-batch, forward and backward."""

    tensor: float
    context: float
    expert: float
    pipeline: float


def message_bytes(shape: ModelShape, config: Config, tokens: float) -> Messages:
    """Return what one rank sends.

    Tensor parallel ranks gather and scatter (or all-reduce, which is both) around attention and around the feed-forward
    network in every pass, and gather once more for the gradients of weights under sequence parallelism; around experts only
    ranks that share one do, for all copies of a token. Context parallel ranks pass keys and values on, and back with their
    gradients. A token travels to its experts and back.

    Args:
        tokens: of the micro-batch on this context parallel rank.
    """
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    layers, hidden = shape.layers / parallel.pipeline, item * shape.hidden * tokens
    forwards = forward_passes(config)
    # Half of them are around the feed-forward network.
    around = tensor_messages(forwards, parallel) / 2
    width, others = parallel.expert_tensor_ranks, parallel.tensor - 1
    beside = others + (shape.experts_per_token * (width - 1) if shape.experts else others)
    keys = 2 * shape.kv_heads * shape.head_dim / parallel.tensor * item * tokens
    share = 1 / parallel.tensor if parallel.sequence else 1.0
    return Messages(
        tensor=layers * around * beside * hidden / parallel.tensor,
        context=layers * (forwards + 2) * keys * (parallel.context - 1),
        expert=layers * 2 * (forwards + 1) * shape.experts_per_token * hidden * share * (1 - 1 / parallel.expert),
        pipeline=2 * parallel.virtual_pipeline * hidden * share if parallel.pipeline > 1 else 0,
    )


def _elementwise_bytes(shape: ModelShape, config: Config, flags: Flags) -> float:
    """Return the memory traffic of one layer's elementwise operations in a forward pass, for one token on one rank.

    Two norms and two residual sums: 10 · hidden. The rotation: 2 · heads, or 12 kernel by kernel. The gate: 3 · ffn, or 5.
    Sorting a token's copies for k experts: 2k + 2 hidden, or 5k + 1, and 4k between experts of several ranks. Under FP8 each
    product's input is read and written once more, in one byte and transposed.
    """
    parallel, copies = config.parallel, shape.experts_per_token
    hidden = shape.hidden / (parallel.tensor if parallel.sequence else 1)
    heads = (shape.heads + shape.kv_heads) * shape.head_dim / parallel.tensor
    inner = (copies or 1) * shape.ffn / parallel.tensor
    sorting = (2 * copies + 2 if flags.permute else 5 * copies + 1) + (4 * copies if parallel.expert > 1 else 0)
    hiddens = 10 + (sorting if shape.experts else 0)
    casts = 4 * (2 * hidden + heads + inner) if config.actor.fp8 != "none" else 0
    moved = hiddens * hidden + (2 if flags.rope else 12) * heads + (3 if flags.activation else 5) * inner
    return ITEM_BYTES[config.model.dtype] * moved + casts


def _added_bytes(shape: ModelShape, config: Config) -> float:
    """Return the memory traffic of a kernel that adds a micro-batch's gradients of one layer to the float32 ones."""
    parallel = config.parallel
    held = stage_parameters(shape, parallel, parallel.pipeline - 1).total - embedding_rows(shape, parallel) * shape.hidden
    return held * parallel.pipeline / shape.layers * (ITEM_BYTES[config.model.dtype] + 2 * GRADIENT_BYTES)


@dataclass(frozen=True)
class StepTime:
    """Seconds of training one batch."""

    passes: float
    """Forward and backward passes of all micro-batches."""
    bubble: float
    """Ranks wait for the pipeline to fill and to drain."""
    reduce: float
    """Gradients over data parallel ranks: what computation does not hide."""
    gather: float
    """The new weights back; likewise."""
    optimizer: float
    offload: float
    """Optimizer state from host memory and back."""

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(vars(self).values())


def train_s(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, batch: StepSize) -> StepTime:
    """Return the seconds of one batch, without the transfer."""
    parallel, peak, count = config.parallel, Peaks(config, cluster), batch.micro_batches
    updates, load = batch.updates, _load(shape, config, batch.micro_batches_of_update)
    one = slowest_pass(shape, config, cluster, flags, batch)
    last = parallel.pipeline - 1
    state = optimizer_bytes(shape, config, last)
    computed, alone = asdict(one), _reductions(shape, config, peak)
    return StepTime(
        passes=count * one.total,
        bubble=updates * last / parallel.virtual_pipeline * one.total,
        **{part: updates * visible(part, seconds, computed, flags, load) for part, seconds in alone.items()},
        optimizer=updates * OPTIMIZER_PASSES * state / peak.memory,
        offload=updates * 2 * state / peak.host if config.actor.offload != "none" else 0.0,
    )


def _reductions(shape: ModelShape, config: Config, peak: Peaks) -> dict[str, float]:
    """Return the seconds of scattering gradients and of gathering weights, nothing beside them."""
    parallel = config.parallel
    dense, experts = _sent_parameters(shape, parallel)
    width = parallel.expert * parallel.expert_tensor_ranks
    replicas = parallel.data * parallel.context
    element = dense / peak.ring(parallel.tensor, replicas)
    if experts:
        element += experts / peak.ring(width, replicas * parallel.tensor // width)
    return {"reduce": element * GRADIENT_BYTES, "gather": element * weight_bytes(config)}


def reduce_bytes(shape: ModelShape, config: Config) -> float:
    """Return the bytes that one rank sends for an optimizer step: gradients scattered in float32, weights gathered."""
    return sum(_sent_parameters(shape, config.parallel)) * (GRADIENT_BYTES + weight_bytes(config))


def _sent_parameters(shape: ModelShape, parallel: ParallelConfig) -> tuple[float, float]:
    """Return how many elements a rank sends in a ring of all that hold the same: dense ones, and those of experts."""
    held = stage_parameters(shape, parallel, parallel.pipeline - 1)
    replicas = parallel.data * parallel.context
    same_experts = replicas * parallel.tensor / (parallel.expert * parallel.expert_tensor_ranks)
    return held.dense * (1 - 1 / replicas), held.expert * (1 - 1 / same_experts)


def flops_per_token(shape: ModelShape, length: int) -> float:
    """Of forward and backward pass without recomputation: 6 a weight of a matrix product, and causal attention.

    Attention: 12 · layers · heads · head_dim · length a token for the whole square (arXiv 2204.02311, appendix B), half of
    it under the causal mask.
    """
    width = shape.heads * shape.head_dim
    attention = shape.hidden * (width + 2 * shape.kv_heads * shape.head_dim) + width * shape.hidden
    weights = shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden
    return 6 * weights + 6 * shape.layers * width * length
