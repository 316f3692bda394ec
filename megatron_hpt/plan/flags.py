"""Which of Megatron's overlaps and fusions a run has, and how much of each communication they leave visible. Pure; no torch.

One table (`OVERLAPS`) for all: a communication that is not in it, or whose flag is off, adds its whole time to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from megatron_hpt.config import Config, KernelFlag, ParallelConfig
from megatron_hpt.plan.memory import runs_fused

FORWARD_SCATTERS = 2
"""Reduce-scatters of a layer's forward pass: after attention and after the feed-forward network."""
SCATTER_SPLITS = 4
"""Pieces that a product with its reduce-scatter is cut into (Transformer Engine 2.11, module/base.py: num_splits)."""
BUCKET = 40_000_000
"""Gradients that travel together, at least (Megatron-Core 0.16.1, distributed_data_parallel.py: bucket_size)."""
BUCKET_A_RANK = 1_000_000
"""Likewise, for each data parallel rank."""


@dataclass(frozen=True)
class Flags:
    """Megatron's switches that change how long a step takes; off: one kernel after the other."""

    hopper_attention: bool = False
    """Attention by cuDNN or FlashAttention-3, as Transformer Engine has it; off: FlashAttention-2, as torch has it."""
    activation: bool = False
    """bias_activation_fusion: SwiGLU in one kernel."""
    rope: bool = False
    """apply_rope_fusion: the rotation in one kernel."""
    gradients: bool = False
    """gradient_accumulation_fusion: products add to the float32 gradients themselves."""
    grouped: bool = False
    """moe_grouped_gemm: one launch for the products of all experts of a rank."""
    permute: bool = False
    """moe_permute_fusion: tokens are sorted by expert, and back, in one kernel each."""
    reduce: bool = False
    """overlap_grad_reduce."""
    gather: bool = False
    """overlap_param_gather."""
    tensor: bool = False
    """tp_comm_overlap: Transformer Engine's userbuffers."""
    context: bool = False
    """Transformer Engine's ring of context parallel ranks (cp_comm_type=p2p)."""
    expert: bool = False
    """overlap_moe_expert_parallel_comm."""
    pipeline: bool = False
    """overlap_p2p_comm."""

    def without_overlaps(self) -> Flags:
        """Return the same fusions with every communication in plain view."""
        return replace(self, **{overlap.part: False for overlap in OVERLAPS})


def flags_of(config: Config) -> Flags:
    """Return what the actor has on GPUs (actor/model/kernels.py).

    Three overlaps that pre-training has are off. Weights leave for the engines right after an optimizer step, so they have
    been gathered by then. Userbuffers have one static shape, and packed micro-batches differ in length ("it doesn't support
    activation tensors dynamically changing between steps", Megatron-Bridge's docs/performance-guide.md). Experts' messages
    hide only in a schedule that runs two micro-batches at a time, which the actor does not have.
    """
    parallel, fused = config.parallel, runs_fused(config)

    def is_on(kernel: KernelFlag) -> bool:
        return fused and config.actor.kernels.get(kernel, True)

    return Flags(
        hopper_attention=fused,
        activation=is_on("bias_activation_fusion"),
        rope=is_on("apply_rope_fusion"),
        gradients=is_on("gradient_accumulation_fusion"),
        grouped=is_on("moe_grouped_gemm"),
        permute=is_on("moe_permute_fusion"),
        reduce=is_on("overlap_grad_reduce") and parallel.data * parallel.context > 1,
        context=fused and parallel.context > 1,
        pipeline=is_on("overlap_p2p_comm") and parallel.virtual_pipeline > 1,
    )


@dataclass(frozen=True)
class Load:
    """What the visible share of a communication depends on."""

    parallel: ParallelConfig
    forwards: float
    """Forward passes of a micro-batch, recomputation and other policies' included."""
    micro_batches: int
    """Of an optimizer step."""
    held: int
    """Parameters of a rank."""


@dataclass(frozen=True)
class Overlap:
    """A communication that runs beside computation."""

    part: str
    """Of a step's time, and its flag."""
    behind: Mapping[str, Callable[[Load], float]]
    """What it runs beside: part of a micro-batch's time → the share of that part."""
    tail: Callable[[Load], float]
    """The share of it that runs beside nothing."""
    why: str
    """Where that is known from."""


def _whole(_: Load) -> float:
    return 1.0


def _backward(load: Load) -> float:
    return 2 / (load.forwards + 2)


def _forward(load: Load) -> float:
    return 1 / (load.forwards + 2)


def _layers(share: Callable[[Load], float]) -> dict[str, Callable[[Load], float]]:
    return dict.fromkeys(("products", "experts", "attention", "elementwise"), share)


def _last_bucket(load: Load) -> float:
    """Return one bucket's share of a rank's gradients; under an interleaved pipeline a piece of the model is a bucket."""
    if load.parallel.virtual_pipeline > 1:
        return 1 / load.parallel.virtual_pipeline
    replicas = load.parallel.data * load.parallel.context
    return min(1.0, max(BUCKET, BUCKET_A_RANK * replicas) / load.held)


def _last_chunks(load: Load) -> float:
    """Return the share of a last chunk of every reduce-scatter of the forward passes, of all messages of a layer."""
    return FORWARD_SCATTERS * load.forwards / SCATTER_SPLITS / tensor_messages(load.forwards, load.parallel)


def _warm_up(load: Load) -> float:
    """Return the share of warm-up and drain in the last stage's passes."""
    pieces = load.parallel.virtual_pipeline
    return min(1.0, (pieces - 1) * load.parallel.pipeline / (load.micro_batches * pieces))


OVERLAPS = (
    Overlap(
        "tensor",
        {"products": _whole},
        _last_chunks,
        "products are cut into pieces, each beside the message of another; of a product with its reduce-scatter the last "
        "piece's message stays exposed (Megatron-Bridge, docs/performance-guide.md, Communication Overlaps 3.3)",
    ),
    Overlap(
        "context",
        {"attention": lambda load: 1 - 1 / load.parallel.context},
        lambda load: 0.0,
        "the ring's messages run beside the attention of the chunks before the last (same page, 4.1)",
    ),
    Overlap(
        "pipeline",
        _layers(_whole),
        _warm_up,
        "hidden in the steady state, exposed in warm-up and flush (same page, 6; megatron/core/pipeline_parallel/schedules.py)",
    ),
    Overlap(
        "expert",
        _layers(_whole),
        _warm_up,
        "tokens of one micro-batch travel beside another's pass in the steady state (same repository, "
        "docs/training/communication-overlap.md)",
    ),
    Overlap(
        "reduce",
        _layers(_backward),
        _last_bucket,
        "beside the last micro-batch's backward pass (same page, 1.1), all but one bucket (NeMo's user guide 25.09, "
        "Communication Overlap)",
    ),
    Overlap(
        "gather",
        _layers(_forward),
        _last_bucket,
        "beside the first micro-batch's forward pass (same page, 1.1), all but one bucket",
    ),
)


def visible(part: str, seconds: float, computed: Mapping[str, float], flags: Flags, load: Load) -> float:
    """Return the seconds of a communication that computation does not hide.

    Args:
        part: of a step's time.
        seconds: that it takes alone.
        computed: seconds of each part of a micro-batch's computation.
    """
    overlap = next((row for row in OVERLAPS if row.part == part), None)
    if overlap is None or not getattr(flags, part):
        return seconds
    tail = seconds * overlap.tail(load)
    cover = sum(share(load) * computed[name] for name, share in overlap.behind.items())
    return tail + max(0.0, seconds - tail - cover)


def tensor_messages(forwards: float, parallel: ParallelConfig) -> float:
    """Return how often tensor parallel ranks gather or scatter a layer's activations for one micro-batch: twice around
    attention and twice around the feed-forward network in every pass, and for the gradients of two weights once more under
    sequence parallelism."""
    return 4 * (forwards + 1) + (2 if parallel.sequence else 0)
