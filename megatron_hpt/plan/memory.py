"""Memory of one trainer rank and of one engine rank, from shape and layout alone. Pure; no torch.

The formulae and their sources: docs/plan.md. Weights, gradients and optimizer state are counted; activations are counted
tensor by tensor for Transformer Engine's layers; what CUDA, NCCL and the allocator take is an allowance.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.transfer.layouts import VOCABULARY_MULTIPLE

GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are added up and reduced in float32 (actor/optimizer/optimizer.py: wrap)."""
STATE_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two moments in float32, and the main weights where the weights are not float32 themselves."""
LOGITS_BYTES = 256 * 2**20
"""Float32 logits of one chunk (actor/model/logprob.py: CHUNK_BYTES)."""
TILE_TOKENS = 16384
"""Tokens whose logits Triton's kernel has at once (actor/model/logprob_kernel.py: TILE_TOKENS)."""
WINDOW_BYTES = 2**30
"""Where a rank's boxes wait for engines (transfer.transport=nccl: a window of 1 GiB a rank)."""
ALLOWANCE_BYTES = 6 * GIB
"""CUDA context, NCCL's buffers, workspaces of matrix products, fragments (NVIDIA quotes none; our allowance)."""
RESTING_ALLOWANCE_BYTES = 3 * GIB
"""What is left of that while the trainer waits, its allocator's cache given back: CUDA context, NCCL's buffers."""


@dataclass(frozen=True)
class Parameters:
    """Number of parameters that one rank holds."""

    dense: int
    expert: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert


def _attention(shape: ModelShape) -> int:
    """Matrices and biases that tensor parallel ranks share evenly."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return shape.hidden * (width + shape.heads * shape.head_dim) + (width if shape.qkv_bias else 0)


def _feed_forward(shape: ModelShape) -> int:
    """One feed-forward network: gate, up, down."""
    return 3 * shape.hidden * shape.ffn


def _copied(shape: ModelShape) -> int:
    """Of a layer, on every tensor parallel rank: norms and router."""
    return 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0) + shape.experts * shape.hidden


def embedding_rows(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Rows of the vocabulary on one tensor parallel rank, padding included."""
    return -(-shape.vocab // parallel.tensor)


def stage_parameters(shape: ModelShape, parallel: ParallelConfig, stage: int) -> Parameters:
    """What a rank of one pipeline stage holds."""
    layers, last = shape.layers // parallel.pipeline, stage == parallel.pipeline - 1
    expert_tensor = parallel.expert_tensor_ranks
    cut = _attention(shape) + (0 if shape.experts else _feed_forward(shape))
    experts = layers * shape.experts * _feed_forward(shape) // (parallel.expert * expert_tensor)
    # A tied output layer is the embedding itself, where both are on one stage.
    matrices = (stage == 0) + last - (stage == 0 and last and shape.tied_embeddings)
    ends = matrices * embedding_rows(shape, parallel) * shape.hidden + last * shape.hidden
    return Parameters(layers * (cut // parallel.tensor + _copied(shape)) + ends, experts)


def parameters(shape: ModelShape) -> Parameters:
    """Of the whole model."""
    return stage_parameters(shape, ParallelConfig(), 0)


def active_parameters(shape: ModelShape) -> tuple[int, int]:
    """Weights that one token is multiplied with: in all layers, and in the output layer."""
    networks = shape.experts_per_token or 1
    return shape.layers * (_attention(shape) + networks * _feed_forward(shape)), shape.vocab * shape.hidden


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on the GPU of one trainer rank."""

    weights: float
    gradients: float
    optimizer: float
    """There in every optimizer step; under actor.offload in host memory otherwise."""
    activations: float
    logprob: float
    """The chunks of logits and the gradient of the output layer; on the last stage."""
    reference: float
    """Weights of the frozen reference policy."""
    transfer: float
    """Weights that wait for engines to read them."""
    allowance: float
    rests: bool
    """Whether actor.offload keeps the optimizer state away from forward and backward passes."""
    leaves: bool
    """Whether it keeps weights, gradients and the reference policy away while the trainer waits for rollouts."""

    @property
    def total(self) -> float:
        """The peak: passes and optimizer step need what they need at different times."""
        always = self.weights + self.gradients + self.reference + self.transfer + self.allowance
        passes = self.activations + self.logprob
        return always + (max(passes, self.optimizer) if self.rests else passes + self.optimizer)

    @property
    def sending(self) -> float:
        """While engines read new weights."""
        return self.weights + self.gradients + self.reference + self.waiting_at_least

    @property
    def waiting(self) -> float:
        """While engines sample."""
        return self.waiting_at_least if self.leaves else self.sending

    @property
    def waiting_at_least(self) -> float:
        """What no setting takes away: boxes that engines read again after a restart, and what CUDA needs."""
        return self.transfer + RESTING_ALLOWANCE_BYTES + (0 if self.rests else self.optimizer)


def weight_bytes(config: Config) -> int:
    """Return the bytes of one weight of the actor, as it computes with it and gathers it."""
    return 1 if config.actor.fp8_param_gather else ITEM_BYTES[config.model.dtype]


def trainer_memory(shape: ModelShape, config: Config, stage: int, micro_batches: int) -> TrainerMemory:
    """The peak of a rank of one pipeline stage.

    Args:
        micro_batches: of a step, a rank; fewer than the pipeline is deep keep fewer activations.
    """
    parallel = config.parallel
    held = stage_parameters(shape, parallel, stage)
    weights = held.total * weight_bytes(config)
    return TrainerMemory(
        weights=weights,
        gradients=held.total * GRADIENT_BYTES,
        optimizer=optimizer_bytes(shape, config, stage),
        activations=_activations(shape, config, stage, micro_batches),
        logprob=_logprob(shape, config) if stage == parallel.pipeline - 1 else 0,
        reference=weights if config.algorithm.kl.coefficient else 0,
        transfer=_staged(held, config),
        allowance=ALLOWANCE_BYTES,
        rests=config.actor.offload != "none",
        leaves=config.actor.offload == "all",
    )


def heaviest_stage(shape: ModelShape, config: Config, micro_batches: int) -> tuple[int, TrainerMemory]:
    """The pipeline stage whose ranks need the most, and what they need."""
    every = ((stage, trainer_memory(shape, config, stage, micro_batches)) for stage in range(config.parallel.pipeline))
    return max(every, key=lambda found: found[1].total)


def optimizer_bytes(shape: ModelShape, config: Config, stage: int) -> float:
    """Optimizer state of a rank, wherever it lies: of dense parameters, cut over data and context parallel ranks; of experts,
    over those that hold the same ones."""
    parallel = config.parallel
    replicas = parallel.data * parallel.context
    share = parallel.expert * parallel.expert_tensor_ranks
    held = stage_parameters(shape, parallel, stage)
    return STATE_BYTES[config.model.dtype] * (held.dense / replicas + held.expert * share / (replicas * parallel.tensor))


def runs_fused(config: Config) -> bool:
    """Return whether the actor's layers are Transformer Engine's and fused; in float32 they are Megatron's own."""
    return config.model.dtype != "float32"


def rank_tokens(config: Config) -> float:
    """Tokens of the largest micro-batch on one context parallel rank: a row longer than the budget has one of its own."""
    return max(config.actor.micro_batch_tokens, config.max_sequence_length) / config.parallel.context


def layer_bytes(shape: ModelShape, config: Config) -> float:
    """What the backward pass of one layer needs from its forward pass, for one token on one rank.

    Both norms keep input and output; attention keeps queries, keys, values, output and a float32 sum a head; the gated
    feed-forward network keeps the output of its first product (2 · ffn) and its second product's input (ffn), and without
    Megatron's fusion of the gate the output of the activation (ffn). A token that goes to k experts is there k times, and
    tensor parallel ranks share these copies.
    """
    parallel, item = config.parallel, ITEM_BYTES[config.model.dtype]
    whole = 4 * shape.hidden / (parallel.tensor if parallel.sequence else 1)
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim / parallel.tensor
    networks = shape.experts_per_token or 1
    width = parallel.expert_tensor_ranks
    dispatched = 2 * networks * shape.hidden * width / parallel.tensor if shape.experts else 0
    inner = (3 if runs_fused(config) else 4) * networks * shape.ffn / parallel.tensor
    return item * (whole + heads + dispatched + inner) + 4 * shape.heads / parallel.tensor


def _activations(shape: ModelShape, config: Config, stage: int, micro_batches: int) -> float:
    parallel, tokens = config.parallel, rank_tokens(config)
    layers = shape.layers / (parallel.pipeline * parallel.virtual_pipeline)
    alive = layers * min(_pieces_in_flight(parallel, stage), micro_batches * parallel.virtual_pipeline)
    full = layer_bytes(shape, config)
    if config.actor.recompute != "full":
        return tokens * alive * full
    kept = ITEM_BYTES[config.model.dtype] * shape.hidden / (parallel.tensor if parallel.sequence else 1)
    return tokens * (alive * kept + full)


def _pieces_in_flight(parallel: ParallelConfig, stage: int) -> int:
    """Forward passes of a piece of the model whose backward pass has not begun, at most (Megatron's schedules: 1F1B, and
    interleaved with its warm-up of 2 · (stages left) + (pieces - 1) · stages)."""
    left = parallel.pipeline - 1 - stage
    pieces = parallel.virtual_pipeline
    return left + 1 if pieces == 1 else 2 * left + (pieces - 1) * parallel.pipeline + 1


def _logprob(shape: ModelShape, config: Config) -> float:
    """The backward pass over a chunk: logits, probabilities, their gradient in the weights' precision; then the output layer's
    gradient in float32, one product that is added to it, and its copy in the weights' precision.

    With Triton's kernel: a tile of logits, which becomes their gradient; the hidden states' gradient in float32; one product
    that is added to it; the output layer's gradient, in float32 too where there are several tiles of tokens.
    """
    rows, item = embedding_rows(shape, config.parallel), ITEM_BYTES[config.model.dtype]
    tokens = rank_tokens(config)
    chunk = min(LOGITS_BYTES, 4 * rows * tokens)
    if config.actor.logprob_kernel == "triton":
        states = 4 * min(tokens, TILE_TOKENS) * shape.hidden
        return chunk + states + max(chunk, states) + rows * shape.hidden * (item if tokens <= TILE_TOKENS else 4 + item)
    return chunk * (2 + item / 4) + rows * shape.hidden * (4 + 2 * item)


def _staged(held: Parameters, config: Config) -> float:
    """Device memory of the transport: a share of the weights for engines on the same GPU, a window for messages."""
    replicas = config.parallel.data * config.parallel.context
    bytes_of = {"cuda_ipc": held.total * ITEM_BYTES[config.model.dtype] / replicas, "nccl": WINDOW_BYTES}
    return bytes_of.get(config.transfer.transport, 0)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the GPU of one rank of an engine."""

    weights: float
    allowance: float
    cache: float
    """Room for keys and values; not above 0: the weights alone do not fit."""
    token: float
    """Keys and values of one token."""
    tokens: int
    """Tokens that the cache holds."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.allowance + max(0.0, self.cache)


def engine_weights(shape: ModelShape, tensor: int, item: float) -> float:
    """Bytes of one rank: key and value heads are copied where there are fewer than ranks.

    Args:
        item: bytes of a weight of a layer; embedding and output layer stay in two (four in float32).
    """
    groups = max(1.0, shape.kv_heads / tensor)
    attention = shape.hidden * shape.head_dim * (2 * shape.heads / tensor + 2 * groups)
    layer = attention + max(1, shape.experts) * _feed_forward(shape) / tensor
    rows = -(-shape.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE / tensor
    matrices = 1 if shape.tied_embeddings else 2
    return shape.layers * (layer * item + _copied(shape) * max(2, item)) + matrices * rows * shape.hidden * max(2, item)


def engine_memory(shape: ModelShape, config: Config, item: float, gpu_bytes: float) -> EngineMemory:
    """One rank of an engine: `rollout.gpu_memory_share` of the GPU.

    Args:
        item: bytes of a weight of a layer.
    """
    tensor, own = config.rollout.tensor_parallel, config.rollout.gpu_memory_share * gpu_bytes
    allowance = engine_of(config).workspace_bytes(own)
    weights = engine_weights(shape, tensor, item)
    groups = max(1.0, shape.kv_heads / tensor)
    token = 2 * shape.layers * groups * shape.head_dim * ITEM_BYTES[config.model.dtype]
    cache = own - weights - allowance
    return EngineMemory(weights, allowance, cache, token, max(0, int(cache / token)))


def checkpoint_bytes(shape: ModelShape, config: Config) -> tuple[float, float]:
    """Of weights, and of optimizer state, in one checkpoint."""
    total = parameters(shape).total
    return total * ITEM_BYTES[config.model.dtype], total * STATE_BYTES[config.model.dtype]
