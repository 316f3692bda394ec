"""Process groups of one trainer rank."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.weights.mapping import Place


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout."""

    rank: int
    tensor: Place
    pipeline: int
    data: int
    data_size: int
    is_last_stage: bool

    @property
    def is_lead(self) -> bool:
        """Rank 0: talks to the outside."""
        return self.rank == 0

    @property
    def reports(self) -> bool:
        """One tensor parallel rank of the last stage, per data parallel rank: counts each loss once."""
        return self.is_last_stage and self.tensor.rank == 0


def initialize(config: ParallelConfig, platform: Platform, seed: int, deadline_s: float) -> Ranks:
    """Join the process group that torchrun (or srun) describes and form Megatron's groups.

    Raises:
        ConfigError: the launcher started another number of ranks than the layout needs.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world != config.ranks:
        raise ConfigError(
            f"parallel: tensor {config.tensor} × pipeline {config.pipeline} × data {config.data} needs {config.ranks} "
            f"ranks, but {world} were started"
        )
    dist.init_process_group(platform.backend, timeout=datetime.timedelta(seconds=deadline_s))
    parallel_state.initialize_model_parallel(config.tensor, config.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Ranks(
        rank=dist.get_rank(),
        tensor=Place(parallel_state.get_tensor_model_parallel_rank(), config.tensor),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )


def shutdown() -> None:
    """Leave the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
