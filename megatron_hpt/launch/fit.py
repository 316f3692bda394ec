"""Whether a layout fits the GPUs. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.launch.cluster import ClusterConfig
from megatron_hpt.launch.memory import (
    GIB,
    ITEM_BYTES,
    EngineMemory,
    TrainerMemory,
    engine_memory,
    heaviest_stage,
    host_bytes,
)
from megatron_hpt.launch.published import engine_item_bytes
from megatron_hpt.launch.topology import Topology
from megatron_hpt.weights.hf_config import ModelShape


@dataclass(frozen=True)
class Fit:
    """Memory of the fullest ranks, and whether there is that much."""

    stage: int
    """The pipeline stage whose ranks are fullest."""
    trainer: TrainerMemory
    engine: EngineMemory
    host: float
    """Bytes in the host memory of one node."""
    problems: tuple[str, ...]
    """Why it does not fit; none: it does."""


def fit(config: Config, shape: ModelShape, cluster: ClusterConfig, topology: Topology) -> Fit:
    """Whether a layout that divides the model fits the GPUs."""
    room = cluster.gpu.memory_gib * GIB
    stage, trainer = heaviest_stage(shape, config, _pipeline_full(config))
    neighbour = trainer.total if topology.is_colocated else 0.0
    engine = engine_memory(shape, config, engine_item_bytes(config, ITEM_BYTES[config.model.dtype]), room, neighbour)
    problems = []
    needs = "fp8" if config.actor.fp8 != "none" else config.model.dtype
    if needs not in cluster.gpu.tflops:
        problems.append(f"{cluster.gpu.name} does not compute in {needs} (gpu.tflops of {cluster.name})")
    host = host_bytes(shape, config, stage) * min(config.parallel.ranks, cluster.gpus_per_node)
    if host > cluster.host_memory_gib * GIB:
        problems.append(
            f"a node's host holds {host / GIB:.0f} GiB of resting optimizer state and a checkpoint that is being written; it "
            f"has {cluster.host_memory_gib:g}"
        )
    if trainer.total > room:
        problems.append(f"a trainer rank needs {trainer.total / GIB:.1f} GiB of {cluster.gpu.memory_gib:g}")
    elif engine.tokens < config.max_sequence_length and not config.rollout.urls:
        beside = f" beside {trainer.total / GIB:.1f} GiB of the trainer on the same GPU" if topology.is_colocated else ""
        problems.append(
            f"an engine rank has room for {engine.tokens:,} tokens of keys and values after {engine.weights / GIB:.1f} GiB of "
            f"weights{beside}; one sequence has {config.max_sequence_length:,}"
        )
    return Fit(stage, trainer, engine, host, tuple(problems))


def _pipeline_full(config: Config) -> int:
    """Micro-batches that fill the pipeline."""
    return 2 * config.parallel.pipeline
