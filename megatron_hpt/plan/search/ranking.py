"""The fastest layouts of a recipe on a cluster (`megatron-hpt plan --search`): candidates, fit, time, ranking. Pure; no torch.

Trainers and engines are timed apart, and only what may be among the fastest is put together and simulated (`timeline`). A
layout is who has how many ranks of what kind; what buys memory or a smaller bubble (micro-batches, recomputation, offload,
pieces of a pipeline stage) is chosen for each.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.published import engine_item_bytes
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.fit import fit, fit_gpus
from megatron_hpt.plan.layout import check_layout
from megatron_hpt.plan.memory import GIB, ITEM_BYTES, engine_memory
from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.rollouts.timeline import BatchWork, alone
from megatron_hpt.plan.scenario import Scenario, scenario, transfer_of, work_of
from megatron_hpt.plan.search.candidates import Placement, changed, engines, placements
from megatron_hpt.plan.search.queue import Pair, Queue
from megatron_hpt.plan.search.trainers import OWN_GPUS, SPARE_GIB, Trainer, Trainers
from megatron_hpt.plan.topology import place

SHOWN = 5
"""Layouts of an answer."""


@dataclass(frozen=True)
class Ranked:
    """A layout that fits."""

    config: Config
    scenario: Scenario
    spare_gib: float
    """Of the fullest GPU with a trainer rank."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.scenario.seconds

    @property
    def layout(self) -> tuple[object, ...]:
        """Return what no other layout of a ranking has."""
        rollout = self.config.rollout
        trainer = Trainer(self.config, 0.0).layout
        return (*trainer, rollout.servers, rollout.tensor_parallel, rollout.max_lag, self.config.transfer.shares_gpus)


@dataclass(frozen=True)
class Ranking:
    """The answer to a search."""

    fastest: tuple[Ranked, ...]
    """At most `SHOWN`, the fastest first."""
    given: Ranked | None
    """The recipe's own layout; None: it does not fit this cluster."""
    by_lag: dict[int, Ranked]
    """The fastest for each `rollout.max_lag` that was tried."""
    share: float
    """Of the prompts, taught by demonstrations."""
    lengths: Lengths
    cluster: ClusterConfig
    timed: int
    """Trainers and pairs of trainer and engines that were timed."""
    seconds: float
    """That the search took."""


def search(config: Config, shape: ModelShape, cluster: ClusterConfig, lengths: Lengths, share: float, max_lag: int) -> Ranking:
    """Return the fastest layouts of a recipe that fit a cluster.

    Args:
        share: of the prompts that are taught by their demonstration.
        max_lag: largest `rollout.max_lag` that is tried; the recipe's own layout is ranked with its own.

    Raises:
        ConfigError: nothing fits.
    """
    started = time.perf_counter()
    layouts = _Layouts(config, shape, cluster, lengths, share, max_lag)
    given = layouts.ranked(config)
    fastest = layouts.fastest(SHOWN, given, layouts.lags)
    if not fastest:
        raise ConfigError(f"no layout of {config.name} was found that fits {cluster.name}")
    own = {given.config.rollout.max_lag: given} if given else {}
    by_lag = {lag: best for lag in layouts.lags for best in layouts.fastest(1, own.get(lag), [lag])}
    seconds = time.perf_counter() - started
    return Ranking(tuple(fastest), given, by_lag, share, lengths, cluster, layouts.timed, seconds)


@dataclass(frozen=True)
class _Servers:
    """Engines of a placement."""

    config: Config
    """The recipe with them; the trainer is still open."""
    work: BatchWork
    """What a step asks of one, but for the trainer's part."""
    alone_s: float
    """Seconds of a batch alone on them."""


class _Layouts:
    """All layouts of a search, most of which are never looked at."""

    def __init__(
        self, config: Config, shape: ModelShape, cluster: ClusterConfig, lengths: Lengths, share: float, max_lag: int
    ) -> None:
        self.lags = range(max_lag + 1)
        """Values of `rollout.max_lag` that are tried."""
        self._config, self._shape, self._cluster, self._lengths, self._share = config, shape, cluster, lengths, share
        self._near = cluster.nodes == 1 and not config.rollout.urls
        self._trainers = Trainers(config, shape, cluster, lengths, share)
        self._servers = {placement: list(self._fitting(placement)) for placement in placements(config, cluster)}
        self._timed = 0

    @property
    def timed(self) -> int:
        """Trainers, and pairs of trainer and engines, that were timed."""
        return self._trainers.timed + self._timed

    def fastest(self, count: int, given: Ranked | None, lags: Sequence[int]) -> list[Ranked]:
        """Return the fastest with some values of `rollout.max_lag`.

        Args:
            given: the recipe's own layout, which is one of them.
        """
        best = {given.layout: given} if given else {}
        queue = Queue(self._bounds(lags), self._pairs)
        while pair := queue.next():
            ahead = heapq.nsmallest(count, (each.seconds for each in best.values()))
            if len(ahead) == count and pair.least > ahead[-1]:
                break  # what comes now is slower still
            self._timed += 1
            ranked = self.ranked(pair.layout)
            queue.go_on(pair, ranked.seconds if ranked else 0.0)
            if not ranked or ranked.spare_gib < SPARE_GIB:
                continue
            if ranked.layout not in best or ranked.seconds < best[ranked.layout].seconds:
                best[ranked.layout] = ranked
        return heapq.nsmallest(count, best.values(), key=lambda each: each.seconds)

    def ranked(self, layout: Config) -> Ranked | None:
        """Return a layout with its times; None: it does not fit."""
        try:
            check_layout(layout, self._shape)
            topology = place(layout, self._cluster)
        except ConfigError:
            return None
        found = fit(layout, self._shape, self._cluster, topology)
        if found.problems:
            return None
        near = topology.nodes == 1 and not layout.rollout.urls
        batch = self._trainers.batch(layout)
        step = scenario(self._shape, layout, self._cluster, found.engine, self._lengths, self._share, batch, near)
        fullest = max((moment.total for moment in found.moments), default=found.trainer.total)
        return Ranked(layout, step, self._cluster.gpu.memory_gib - fullest / GIB)

    def _bounds(self, lags: Sequence[int]) -> list[tuple[float, Placement, int]]:
        """Return placements with a lag, each with a time that none of its layouts beats."""
        bounds = []
        for placement, every in self._servers.items():
            training = self._trainers.least_s(placement.trainer_ranks)
            for lag in [lag for lag in lags if not (placement.is_shared and lag)]:
                least = (self._least_s(servers, training, 0.0, lag) for servers in every)
                bounds.append((min(least, default=math.inf), placement, lag))
        return [bound for bound in bounds if bound[0] < math.inf]

    def _least_s(self, servers: _Servers, training_s: float, transfer_s: float, lag: int) -> float:
        return replace(servers.work, training_s=training_s, transfer_s=transfer_s).least_s(lag, servers.alone_s)

    def _pairs(self, placement: Placement, lag: int) -> Iterator[Iterator[Pair]]:
        """Yield, for all engines of a placement, the fastest trainers beside them, the fastest first."""
        trainers = self._trainers.fastest(placement.trainer_ranks, ("all",) if placement.is_shared else OWN_GPUS)
        for servers in self._servers[placement]:
            yield self._beside(servers, trainers, placement.is_shared, lag)

    def _beside(self, servers: _Servers, trainers: Sequence[Trainer], is_shared: bool, lag: int) -> Iterator[Pair]:
        for trainer in trainers:
            layout = servers.config.model_copy(update={"parallel": trainer.config.parallel, "actor": trainer.config.actor})
            layout = changed(layout, rollout={"max_lag": lag})
            if is_shared:
                layout = self._with_share(layout)
            sent = transfer_of(self._shape, layout, self._cluster, self._near).seconds
            yield Pair(self._least_s(servers, trainer.seconds, sent, lag), layout)

    def _fitting(self, placement: Placement) -> Iterator[_Servers]:
        """Yield the engines of a placement that hold a sequence."""
        room = self._cluster.gpu.memory_gib * GIB
        for config in engines(placement.applied(self._config), self._shape, self._cluster, placement.engine_gpus):
            memory = engine_memory(self._shape, config, engine_item_bytes(config, ITEM_BYTES[config.model.dtype]), room)
            work = work_of(self._shape, config, self._cluster, memory, self._lengths, 0.0, 0.0)
            given = self._config.rollout.max_running
            is_idle = config.rollout.max_running > given >= work.sequences * len(self.lags)  # there are never as many
            if (memory.tokens >= config.max_sequence_length and not is_idle) or config.rollout.urls:
                yield _Servers(config, work, alone(work).total)

    def _with_share(self, layout: Config) -> Config:
        """Return a layout whose engines leave the trainer on the same GPUs its memory, and what is to be spared."""
        gib = self._cluster.gpu.memory_gib
        most = fit_gpus(layout, self._shape, gib, colocated=True).largest_share
        share = math.floor(100 * (most - SPARE_GIB / gib)) / 100
        return changed(layout, rollout={"gpu_memory_share": share}) if 0 < share < layout.rollout.gpu_memory_share else layout
