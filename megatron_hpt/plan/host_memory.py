"""Memory of a node's host: optimizer state that rests there, and a checkpoint that is being written. Pure; no torch."""

from __future__ import annotations

import math

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.memory import (
    STATE_BYTES,
    checkpoint_bytes,
    embedding_rows,
    optimizer_bytes,
    stage_parameters,
    weight_bytes,
)

LAST_PIECE_BYTES = 2**20
"""Below this the actor pins what is left in one piece (actor/optimizer/offload.py: pinned_sizes)."""


def host_bytes(shape: ModelShape, config: Config, stage: int) -> float:
    """Return the bytes that one rank takes of its host's memory: what rests there, and a copy for a checkpoint's writer."""
    weights, _ = checkpoint_bytes(shape, config)
    return resting_bytes(shape, config, stage) + optimizer_bytes(shape, config, stage) + weights / config.parallel.ranks


def resting_bytes(shape: ModelShape, config: Config, stage: int) -> float:
    """Return the pinned bytes of one rank under actor.offload.

    Main weights and moments rest tensor by tensor, of which a rank has its share: the distributed optimizer cuts one long
    buffer of all. Under `all` the weights rest too, buffer by buffer, and the reference policy's; gradients are not kept.
    """
    parallel, kind = config.parallel, config.actor.offload
    if kind == "none":
        return 0.0
    float32, kinds = 4, STATE_BYTES[config.model.dtype] // 4
    state = sum(count * kinds * pinned(float32 * size) / replicas for size, count, replicas in _tensors(shape, parallel, stage))
    if kind == "optimizer":
        return state
    held = stage_parameters(shape, parallel, stage)
    item = weight_bytes(config)
    buffers = pinned(held.dense * item) + pinned(held.expert * item)
    reference = sum(count * pinned(item * size) for size, count, _ in _tensors(shape, parallel, stage))
    return state + buffers + (reference if config.algorithm.kl.coefficient else 0)


def pinned(nbytes: float) -> int:
    """Return what pinning so many bytes takes. Torch rounds each piece up to a power of two (CachingHostAllocator); the actor's
    pieces are such powers, but for the last."""
    pieces, rest = divmod(math.ceil(nbytes), LAST_PIECE_BYTES)
    return pieces * LAST_PIECE_BYTES + (1 << (rest - 1).bit_length() if rest else 0)


def _tensors(shape: ModelShape, parallel: ParallelConfig, stage: int) -> list[tuple[int, int, float]]:
    """Return the tensors of a pipeline stage's rank, norms and biases left out: elements of each, how many there are, and how
    many ranks share their optimizer state."""
    tensor, replicas = parallel.tensor, parallel.data * parallel.context
    width = parallel.expert_tensor_ranks
    layers, last = shape.layers // parallel.pipeline, stage == parallel.pipeline - 1
    queries = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim // tensor
    output = shape.hidden * shape.heads * shape.head_dim // tensor
    ends = (stage == 0) + last - (stage == 0 and last and shape.tied_embeddings)
    tensors = [
        (queries, layers, replicas),
        (output, layers, replicas),
        (embedding_rows(shape, parallel) * shape.hidden, ends, replicas),
    ]
    cut, networks, sharing = (width, layers * shape.experts // parallel.expert, replicas * tensor / (parallel.expert * width))
    if not shape.experts:
        cut, networks, sharing = tensor, layers, replicas
    wide = shape.hidden * shape.ffn // cut
    return [*tensors, (2 * wide, networks, sharing), (wide, networks, sharing)]
