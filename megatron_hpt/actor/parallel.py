"""The process groups of a trainer rank, and where the rank stands in them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.mapping import Place


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout."""

    rank: int
    tensor: Place
    """Which shard of a dense parameter it holds."""
    pipeline: int
    context: Place
    """Which part of every row it computes."""
    expert: Place
    """Which share of a layer's experts it holds."""
    expert_tensor: Place
    """Which shard of an expert's parameter it holds."""
    data: int
    data_size: int
    expert_data: int
    """Its number among the ranks that hold the same shard of the same experts."""
    is_last_stage: bool

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which talks to the outside."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """Whether its sums of the loss count: those of one rank of the last stage for each data parallel rank do."""
        return self.is_last_stage and self.tensor.rank == 0 and self.context.rank == 0


def initialize(config: ParallelConfig, platform: Platform, seed: int, deadline_s: float) -> Ranks:
    """Join the process group that torchrun (or srun) describes in the environment, and form Megatron's groups.

    Args:
        seed: of the random generators.
        deadline_s: seconds after which a collective operation fails.

    Raises:
        ConfigError: the launcher started another number of ranks than the layout needs.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world != config.ranks:
        raise ConfigError(
            f"parallel: tensor {config.tensor} × pipeline {config.pipeline} × context {config.context} × data {config.data} "
            f"needs {config.ranks} ranks, but {world} were started"
        )
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(seconds=deadline_s))
    return initialize_groups(config, seed)


def initialize_groups(config: ParallelConfig, seed: int) -> Ranks:
    """Form Megatron's groups in a process group that has been joined, and seed the random generators."""
    state = parallel_state
    state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(
        rank=dist.get_rank(),
        tensor=Place(state.get_tensor_model_parallel_rank(), config.tensor),
        pipeline=state.get_pipeline_model_parallel_rank(),
        context=Place(state.get_context_parallel_rank(), config.context),
        expert=Place(state.get_expert_model_parallel_rank(), config.expert),
        expert_tensor=Place(state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()),
        data=state.get_data_parallel_rank(),
        data_size=state.get_data_parallel_world_size(),
        expert_data=state.get_expert_data_parallel_rank(),
        is_last_stage=state.is_pipeline_last_stage(),
    )


def shutdown() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
