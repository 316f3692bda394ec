"""The layouts that a search looks at: trainers, engines, and how GPUs are shared out between them. Pure; no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_hpt.config import Config, ParallelConfig, RolloutConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.layout import check_layout
from megatron_hpt.plan.memory import ALLOWANCE_BYTES, GIB, GRADIENT_BYTES, stage_parameters, weight_bytes

DEEPEST = 16
"""Pipeline stages, at most."""
MOST_PIECES = 8
"""Pieces of the model on a pipeline stage, at most."""
WIDEST_EXPERTS = 64
"""Expert parallel ranks, at most."""
SHORTEST_CUT = 4096
"""Tokens of the longest row on a context parallel rank, at least: shorter ones have no attention to hide messages behind."""
GRAPHS = 512
"""Sequences of the largest CUDA graph of vLLM 0.32 up to Hopper (config/vllm.py: default_max_graph_size)."""
BATCHES = (1, 2, 4)
"""Sizes of a micro-batch, in longest rows."""


@dataclass(frozen=True)
class Placement:
    """Where engines are, and how far they work ahead."""

    trainer_ranks: int
    engine_gpus: int
    is_shared: bool = False
    """Engines have the trainer's GPUs in turn with it."""

    def applied(self, config: Config) -> Config:
        """Return the recipe with the settings that this needs; it is without lag."""
        transport = config.transfer.transport
        if self.is_shared:
            transport = "cuda_ipc"
        elif transport in ("cuda_ipc", "shared_memory"):
            transport = "nccl"
        return changed(
            config,
            rollout={"sleep": self.is_shared, "max_lag": 0},
            transfer={"transport": transport},
            actor={"offload": "all" if self.is_shared else "none"},
        )


def changed(config: Config, **sections: dict[str, object]) -> Config:
    """Return a configuration with other values of some settings, which are of the right types: nothing is validated."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def placements(config: Config, cluster: ClusterConfig) -> Iterator[Placement]:
    """Yield the ways to share out a cluster's GPUs, all of them in use.

    Several nodes have trainers or engines each, as `topology.place` wants it; in a single node they are neighbours, or share
    the GPUs. Servers of the user's own (`rollout.urls`) are elsewhere.
    """
    size, gpus = cluster.gpus_per_node, cluster.gpus
    if config.rollout.urls:
        yield Placement(gpus, 0)
        return
    if cluster.nodes == 1:
        yield Placement(gpus, gpus, is_shared=True)
    step = 1 if cluster.nodes == 1 else size
    yield from (Placement(ranks, gpus - ranks) for ranks in range(step, gpus, step))


def engines(config: Config, shape: ModelShape, cluster: ClusterConfig, gpus: int) -> Iterator[Config]:
    """Yield the recipe with each kind of servers that fills so many GPUs, and divides the model."""
    if config.rollout.urls:
        yield config
        return
    for width in divisors(cluster.gpus_per_node):
        for running in sorted({config.rollout.max_running, max(config.rollout.max_running, GRAPHS)}):
            rollout = {"tensor_parallel": width, "servers": gpus // width, "max_running": running}
            candidate = changed(config, rollout=rollout)
            if gpus >= width and _divides(changed(candidate, parallel=ParallelConfig().model_dump()), shape):
                yield candidate


def replicas(config: Config, shape: ModelShape, cluster: ClusterConfig) -> Iterator[Config]:
    """Yield the recipe with each layout of one replica of the model (parallel.data=1), and with each size of micro-batches and
    recomputation, as far as weights and gradients fit a GPU."""
    parallel, room = config.parallel, cluster.gpu.memory_gib * GIB
    longest, size = config.max_sequence_length, cluster.gpus_per_node
    tensors = [n for n in divisors(shape.heads) if n <= size]
    pipelines = [n for n in divisors(shape.layers) if n <= DEEPEST]
    contexts = sorted({parallel.context, *(n for n in divisors(size) if n == 1 or longest >= n * SHORTEST_CUT)})
    experts = [n for n in divisors(shape.experts) if n <= WIDEST_EXPERTS] or [1]
    # The trainer's numbers depend on this one with the reference code's loss, which is a mean over micro-batches.
    kept = config.algorithm.name == "hpt_reference"
    budgets = sorted({config.actor.micro_batch_tokens, *(() if kept else (n * longest for n in BATCHES))})
    for tensor, pipeline, context, expert in itertools.product(tensors, pipelines, contexts, experts):
        for expert_tensor in sorted({1, tensor}) if shape.experts else [None]:
            layout = ParallelConfig.model_construct(
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=1,
                context=context,
                sequence=tensor > 1,
                expert=expert,
                expert_tensor=expert_tensor,
                data=1,
            )
            held = max(stage_parameters(shape, layout, stage).total for stage in (0, pipeline - 1))
            if held * (weight_bytes(config) + GRADIENT_BYTES) + ALLOWANCE_BYTES > room:
                continue
            whole = layout.model_copy(update={"data": expert * (expert_tensor or 1)})
            if not _divides(config.model_copy(update={"parallel": whole, "rollout": RolloutConfig()}), shape):
                continue
            pieces = [n for n in divisors(shape.layers // pipeline) if n <= MOST_PIECES] if pipeline > 1 else [1]
            for virtual, budget, recompute in itertools.product(pieces, budgets, ("none", "full")):
                yield config.model_copy(
                    update={
                        "parallel": layout.model_copy(update={"virtual_pipeline": virtual}),
                        "actor": config.actor.model_copy(update={"micro_batch_tokens": budget, "recompute": recompute}),
                    }
                )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, rising; of 0 none."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _divides(config: Config, shape: ModelShape) -> bool:
    try:
        check_layout(config, shape)
    except ConfigError:
        return False
    return True
