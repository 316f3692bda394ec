"""Memory of a GPU that a trainer rank and an engine share, by what they are doing. Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hpt.config import RolloutConfig
from megatron_hpt.plan.memory import GIB, EngineMemory, TrainerMemory

ASLEEP_BYTES, ASLEEP_WIDE_BYTES = 1.5 * GIB, 2.5 * GIB
"""What a sleeping engine keeps (CUDA context, workspaces) alone, and with NCCL between its ranks. Reported of vLLM: 0.8 and
1.2 GiB alone, 2.4 GiB with two ranks (vllm-project/vllm#28714, NVIDIA-NeMo/RL#223)."""


@dataclass(frozen=True)
class Moment:
    """One of the things that happen on the GPU."""

    what: str
    trainer: float
    """Bytes of the trainer rank."""
    engine: float

    @property
    def total(self) -> float:
        """Bytes of both."""
        return self.trainer + self.engine


def moments(rollout: RolloutConfig, trainer: TrainerMemory, engine: EngineMemory) -> tuple[Moment, ...]:
    """The moments of a step, each of which must fit."""
    if not rollout.sleep:
        return (Moment("steps, each keeping its memory while the other works,", trainer.total, engine.total),)
    asleep = _asleep(rollout)
    return (
        Moment("training steps", trainer.total, asleep),
        Moment("weight transfers", trainer.sending, asleep + engine.weights),
        Moment("rollouts", trainer.waiting, engine.total),
    )


def largest_share(rollout: RolloutConfig, trainer: TrainerMemory, room: float) -> float:
    """The largest `rollout.gpu_memory_share`, in hundredths, beside this trainer; 0 or less: none."""
    beside = trainer.waiting if rollout.sleep else trainer.total
    return math.floor(100 * (1 - beside / room)) / 100


def _asleep(rollout: RolloutConfig) -> float:
    return ASLEEP_BYTES if rollout.tensor_parallel == 1 else ASLEEP_WIDE_BYTES
