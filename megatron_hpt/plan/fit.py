"""Whether a layout fits the GPUs. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hpt.config import Config, RolloutConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.published import engine_item_bytes
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.host_memory import host_bytes
from megatron_hpt.plan.memory import (
    GIB,
    ITEM_BYTES,
    EngineMemory,
    TrainerMemory,
    engine_memory,
    heaviest_stage,
)
from megatron_hpt.plan.shared_gpu import Moment, largest_share, moments
from megatron_hpt.plan.topology import Topology

PIPELINES_FULL = 2
"""Micro-batches of a step, in pipeline stages, that memory is counted for: enough to fill the pipeline."""


@dataclass(frozen=True)
class GpuFit:
    """Memory of the fullest GPUs, and whether there is that much."""

    stage: int
    """The pipeline stage whose ranks are fullest."""
    trainer: TrainerMemory
    engine: EngineMemory
    moments: tuple[Moment, ...]
    """Of a GPU that a trainer rank and an engine share; none: they share none."""
    largest_share: float
    """Of such a GPU, for an engine (`rollout.gpu_memory_share`)."""
    problems: tuple[str, ...]
    """Why it does not fit; none: it does."""


@dataclass(frozen=True)
class Fit(GpuFit):
    """The same, and the nodes that the GPUs are in."""

    host: float
    """Bytes in the host memory of one node."""


def fit(config: Config, shape: ModelShape, cluster: ClusterConfig, topology: Topology) -> Fit:
    """Whether a layout that divides the model fits a cluster."""
    gpus = fit_gpus(config, shape, cluster.gpu.memory_gib, topology.is_colocated)
    host = host_bytes(shape, config, gpus.stage) * min(config.parallel.ranks, cluster.gpus_per_node)
    problems = (*_node_problems(config, cluster, host), *gpus.problems)
    return Fit(gpus.stage, gpus.trainer, gpus.engine, gpus.moments, gpus.largest_share, problems, host)


def fit_gpus(config: Config, shape: ModelShape, gib: float, colocated: bool) -> GpuFit:
    """Whether it fits GPUs of so much memory.

    Args:
        colocated: engines are on the trainer's.
    """
    room = gib * GIB
    stage, trainer = heaviest_stage(shape, config, PIPELINES_FULL * config.parallel.pipeline)
    engine = engine_memory(shape, config, engine_item_bytes(config, ITEM_BYTES[config.model.dtype]), room)
    shared = moments(config.rollout, trainer, engine) if colocated else ()
    most = largest_share(config.rollout, trainer, room)
    return GpuFit(stage, trainer, engine, shared, most, tuple(_gpu_problems(config, gib, trainer, engine, shared, most)))


def _node_problems(config: Config, cluster: ClusterConfig, host: float) -> Iterator[str]:
    needs = "fp8" if config.actor.fp8 != "none" else config.model.dtype
    if needs not in cluster.gpu.tflops:
        yield f"{cluster.gpu.name} does not compute in {needs} (gpu.tflops of {cluster.name})"
    if host > cluster.host_memory_gib * GIB:
        yield (
            f"a node's host holds {host / GIB:.0f} GiB of resting optimizer state and a checkpoint that is being written; it "
            f"has {cluster.host_memory_gib:g}"
        )


def _gpu_problems(
    config: Config,
    gib: float,
    trainer: TrainerMemory,
    engine: EngineMemory,
    shared: tuple[Moment, ...],
    most: float,
) -> Iterator[str]:
    """The first one: what comes after it may be its consequence."""
    share = config.rollout.gpu_memory_share
    if trainer.total > gib * GIB:
        yield f"a trainer rank needs {trainer.total / GIB:.1f} GiB of {gib:g}"
    elif engine.tokens < config.max_sequence_length and not config.rollout.urls:
        yield (
            f"an engine rank has room for {engine.tokens:,} tokens of keys and values after {engine.weights / GIB:.1f} GiB of "
            f"weights in {share:g} of {gib:g} GiB (rollout.gpu_memory_share); one sequence has {config.max_sequence_length:,}"
        )
    elif full := next((moment for moment in shared if moment.total > gib * GIB), None):
        yield (
            f"{full.what} take {full.trainer / GIB:.1f} GiB of the trainer and {full.engine / GIB:.1f} of an engine on the "
            f"same GPU, which has {gib:g}{_remedy(config.rollout, most)}"
        )


def _remedy(rollout: RolloutConfig, most: float) -> str:
    sleep = "" if rollout.sleep else "; with rollout.sleep=true they have it in turn"
    share = f"; rollout.gpu_memory_share is {rollout.gpu_memory_share:g}, at most {most:g} fits" if most > 0 else ""
    return sleep + share


def check_memory(config: Config, shape: ModelShape, gpu_bytes: int) -> None:
    """Refuse a trainer and an engine that do not fit the GPU that they share, by the plan's arithmetic: an engine that does not
    find its share ends the run when it starts, or later in the trainer's hands.

    Args:
        gpu_bytes: memory of each GPU.

    Raises:
        ConfigError: they do not; says how much does.
    """
    if problems := fit_gpus(config, shape, round(gpu_bytes / GIB, 1), colocated=True).problems:
        raise ConfigError("\n".join([*problems, "megatron-hpt plan shows what takes it, and the nearest layout that fits"]))
