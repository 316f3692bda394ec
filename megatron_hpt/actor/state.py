"""What the parts of a training step share: the model on this rank and what it takes to train it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_hpt.actor.microbatch import MicroBatchLayout
from megatron_hpt.actor.model.policy import PolicyModel
from megatron_hpt.actor.optimizer.offload import Offload
from megatron_hpt.actor.parallel import Ranks
from megatron_hpt.actor.platform import Platform
from megatron_hpt.actor.timing import ObjectiveTimer
from megatron_hpt.config import Config
from megatron_hpt.objective.algorithm import Algorithm


@dataclass
class Actor:
    """The model on this rank and what it takes to train it."""

    config: Config
    algorithm: Algorithm
    vocab: int
    wrapped: list[DistributedDataParallel]
    """This rank's chunks of the model with their gradient buffers; more than one under virtual pipelining."""
    optimizer: MegatronOptimizer
    ranks: Ranks
    platform: Platform
    cut: MicroBatchLayout
    """What the layout asks of micro-batches."""
    attention_parity: float
    """Tokens of a row at which its attention costs as much as everything else."""
    reference: list[PolicyModel] | None
    """The frozen reference policy of the KL, laid out like the actor."""
    offload: Offload
    """What rests in host memory."""
    entropy_coefficient: float
    """Where an adaptive coefficient stands."""
    skipped_in_a_row: int = 0
    timer: ObjectiveTimer = field(default_factory=ObjectiveTimer)

    @property
    def chunks(self) -> list[PolicyModel]:
        """The bare chunks of the model."""
        return [wrapped.module for wrapped in self.wrapped]
