"""The fastest trainers of a number of ranks, for `search`. Pure; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.fit import PIPELINES_FULL
from megatron_hpt.plan.flags import flags_of
from megatron_hpt.plan.memory import GIB, heaviest_stage
from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.scenario import batches
from megatron_hpt.plan.search.candidates import changed, replicas
from megatron_hpt.plan.timing import micro_batch_s, train_s

KEPT = 6
"""Layouts of a number of ranks that are put together with engines: the fastest."""
SLACK = 1.1
"""An estimate by tokens may be above the training time by this factor."""
SPARE_GIB = 4.0
"""Of a GPU with a trainer rank, that a layout leaves: the plan's allowances have not been measured."""
OWN_GPUS = ("none", "optimizer")
"""What `actor.offload` may be where engines have GPUs of their own, the fastest first."""


@dataclass(frozen=True)
class Trainer:
    """A layout of the trainer that fits, in a recipe whose engines are still open."""

    config: Config
    seconds: float
    """Of training one batch."""

    @property
    def layout(self) -> tuple[object, ...]:
        """Return what makes two trainers different layouts; other settings are chosen for each."""
        parallel = self.config.parallel
        return (
            *(parallel.tensor, parallel.pipeline, parallel.context, parallel.data),
            *(parallel.expert, parallel.expert_tensor_ranks),
        )


@dataclass(frozen=True)
class _Replica:
    """A layout of one replica of the model."""

    config: Config
    token_s: float
    """Seconds of a token in the passes of a full micro-batch."""

    def data(self, ranks: int) -> int:
        """Return the data parallel ranks among so many, which the replica and its experts divide; 0: they do not."""
        parallel = self.config.parallel
        data, rest = divmod(ranks, parallel.ranks)
        if rest or (parallel.tensor * parallel.context * data) % (parallel.expert * parallel.expert_tensor_ranks):
            return 0
        return data

    def estimate_s(self, tokens: float, data: int) -> float:
        """Return about what a batch takes, without what data parallel ranks send."""
        parallel = self.config.parallel
        count = math.ceil(tokens / data / self.config.actor.micro_batch_tokens)
        bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline / count
        return self.token_s * tokens / data * (1 + bubble)


class Trainers:
    """The trainers of one recipe on one cluster."""

    def __init__(self, config: Config, shape: ModelShape, cluster: ClusterConfig, lengths: Lengths, share: float) -> None:
        self._shape, self._cluster = shape, cluster
        self.batch = batches(shape, config, lengths, share)
        self._size = self.batch(config)
        self._tokens = self._size.tokens * config.trainer.epochs_per_batch
        self._replicas = [_Replica(each, self._token_s(each)) for each in replicas(config, shape, cluster)]
        self._fastest: dict[tuple[int, tuple[str, ...]], list[Trainer]] = {}
        self.timed = 0
        """Layouts that were timed."""

    def _token_s(self, replica: Config) -> float:
        tokens, row = replica.actor.micro_batch_tokens, self._size.attended_tokens
        one = micro_batch_s(self._shape, replica, self._cluster, flags_of(replica), 10**6, tokens, row)
        return one.total / tokens

    def least_s(self, ranks: int) -> float:
        """Return seconds that no trainer of so many ranks beats; infinity where none divides the model."""
        every = (replica.estimate_s(self._tokens, data) for replica in self._replicas if (data := replica.data(ranks)))
        return min(every, default=math.inf) / SLACK

    def fastest(self, ranks: int, offloads: tuple[str, ...]) -> list[Trainer]:
        """Return the fastest trainers of so many ranks that fit their GPUs, the fastest first.

        Args:
            offloads: values of `actor.offload`; the first with which a layout fits is taken.
        """
        if (ranks, offloads) not in self._fastest:
            self._fastest[ranks, offloads] = self._find(ranks, offloads)
        return self._fastest[ranks, offloads]

    def _find(self, ranks: int, offloads: tuple[str, ...]) -> list[Trainer]:
        estimates = (
            (replica.estimate_s(self._tokens, data), number, replica, data)
            for number, replica in enumerate(self._replicas)
            if (data := replica.data(ranks))
        )
        kept: dict[tuple[object, ...], Trainer] = {}
        for estimate, _, replica, data in sorted(estimates, key=lambda each: each[:2]):
            seconds = sorted(trainer.seconds for trainer in kept.values())
            if len(seconds) >= KEPT and estimate > SLACK * seconds[KEPT - 1]:
                break
            trainer = self._fitting(replica.config, data, offloads)
            if trainer and (trainer.layout not in kept or trainer.seconds < kept[trainer.layout].seconds):
                kept[trainer.layout] = trainer
        return sorted(kept.values(), key=lambda trainer: trainer.seconds)[:KEPT]

    def _fitting(self, replica: Config, data: int, offloads: tuple[str, ...]) -> Trainer | None:
        for offload in offloads:
            config = changed(replica, parallel={"data": data}, actor={"offload": offload})
            memory = heaviest_stage(self._shape, config, PIPELINES_FULL * config.parallel.pipeline)[1]
            if memory.total <= (self._cluster.gpu.memory_gib - SPARE_GIB) * GIB:
                self.timed += 1
                step = train_s(self._shape, config, self._cluster, flags_of(config), self.batch(config))
                return Trainer(config, step.total)
        return None
