"""Which cores of a host each side of a run computes on: by `rollout.threads` and `actor.threads`, and what they leave open.

While generation and training take turns, each side may have all cores. Where they overlap (`rollout.max_lag`), each has cores
of its own, if there are enough. All ranks of a side have equally many threads: trainer ranks that hold the same weights must
compute the same bits, and a sample must not depend on the server that made it. Imports no torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.config import Config

WAITING = {"OMP_WAIT_POLICY": "passive"}
"""Environment variable of whatever computes with several threads on a host, read by libgomp when torch is imported.

Threads that wait for each other sleep. By default they spin: where other programs wanted the cores too, the rollouts of SmolLM2
took three times the processor time and four times as long (docs/performance.md).
"""


@dataclass(frozen=True)
class Side:
    """What one side of a run, the trainer or the engines, asks for."""

    ranks: int
    threads: int | None
    """Of one rank; None: as many as there are cores for it."""

    @property
    def least(self) -> int:
        """Cores that its threads need."""
        return self.ranks * (self.threads or 1)


@dataclass(frozen=True)
class Share:
    """What one side of a run gets."""

    ranks: tuple[tuple[int, ...], ...]
    """Cores of each rank, at least one; ranks share cores where there are fewer cores than ranks."""
    threads: int
    """Of every rank."""

    @property
    def cores(self) -> tuple[int, ...]:
        """Cores of all its ranks."""
        return tuple(sorted(set(itertools.chain(*self.ranks))))

    def described(self, side: str) -> str:
        """Name a side with its ranks and threads, e.g. ``trainer 2 ranks × 1 thread``."""
        return f"{side} {_counted(len(self.ranks), 'rank')} × {_counted(self.threads, 'thread')}"


@dataclass(frozen=True)
class Assignment:
    """The cores of both sides of a run."""

    trainer: Share
    engines: Share
    """Of the servers that the run starts: the ranks of the first one, then those of the next."""
    overlapped: bool
    """Whether both sides compute at the same time."""

    @property
    def is_apart(self) -> bool:
        """Whether the sides compute at the same time, on cores of their own."""
        return self.overlapped and not set(self.trainer.cores) & set(self.engines.cores)

    def of_server(self, index: int, tensor_parallel: int) -> tuple[int, ...]:
        """Return the cores of one server's ranks."""
        return Share(self.engines.ranks[index * tensor_parallel :][:tensor_parallel], 1).cores

    def __str__(self) -> str:
        cores = sorted({*self.trainer.cores, *self.engines.cores})
        there, trainer = _named(cores), self.trainer.described("trainer")
        if not self.engines.ranks:
            return f"{there}: {trainer}"
        engines = self.engines.described("engines")
        if not self.overlapped:
            return f"{there}: {trainer}, {engines}, in turns"
        if not self.is_apart:
            return f"{there}: {trainer}, {engines}, at the same time"
        return f"{trainer} on {_named(self.trainer.cores)}, {engines} on {_named(self.engines.cores)}"


def cores_here(topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """Return the numbers of the cores that this process may use; of a core with several hardware threads the first one's.

    A second thread on the same core has the same units for matrix products: torch, vLLM and SGLang count cores likewise.
    """
    first: dict[str, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
        first.setdefault(siblings.read_text(encoding="ascii") if siblings.is_file() else str(number), number)
    return list(first.values())


def assigned(config: Config) -> Assignment:
    """Assign the cores that this process may use to the ranks of a run, all of them on this machine."""
    rollout = config.rollout
    servers = 0 if rollout.urls else rollout.servers
    return assign(
        cores_here(),
        Side(config.parallel.ranks, _number(config.actor.threads)),
        Side(servers * rollout.tensor_parallel, _number(rollout.threads)),
        overlapped=rollout.max_lag > 0 and servers > 0,
    )


def decided(config: Config) -> Config:
    """Return the configuration with a number in place of every ``all`` of `actor.threads` and `rollout.threads`.

    Called by whoever starts a run, before anything is stored: a run that is continued or replayed on another machine then has
    the same threads, and so the same bits.
    """
    found = assigned(config)
    sections = {"actor": config.actor.model_copy(update={"threads": found.trainer.threads})}
    if found.engines.ranks:
        sections["rollout"] = config.rollout.model_copy(update={"threads": found.engines.threads})
    return config.model_copy(update=sections)


def assign(cores: Sequence[int], trainer: Side, engines: Side, overlapped: bool) -> Assignment:
    """Assign cores to ranks. All cores are used, and every rank has at least one.

    Sides that overlap have no core in common if there are enough for all threads; otherwise they share all cores, and ``all``
    means one thread a rank. Numbers of threads that were chosen are kept, however many cores there are.

    Args:
        cores: numbers of the cores, at least one.
    """
    if not overlapped:
        return Assignment(_share(cores, trainer), _share(cores, engines), overlapped)
    left = len(cores) - trainer.least - engines.least
    if left < 0:
        return Assignment(_share(cores, trainer, crowded=True), _share(cores, engines, crowded=True), overlapped)
    # What is left goes to the side that takes all it can get; between two such sides the border is in the middle.
    if trainer.threads is not None:
        border = trainer.least
    elif engines.threads is not None:
        border = trainer.least + left
    else:
        border = min(max(len(cores) // 2, trainer.least), trainer.least + left)
    return Assignment(_share(cores[:border], trainer), _share(cores[border:], engines), overlapped)


def _share(cores: Sequence[int], side: Side, crowded: bool = False) -> Share:
    """Divide cores among a side's ranks, as equally as they go; ranks have as many threads as the smallest part has cores."""
    each, more = divmod(len(cores), max(side.ranks, 1))
    if not each:
        ranks = tuple((cores[rank % len(cores)],) for rank in range(side.ranks))
        return Share(ranks, side.threads or 1)
    starts = [rank * each + min(rank, more) for rank in range(side.ranks + 1)]
    ranks = tuple(tuple(cores[start:end]) for start, end in itertools.pairwise(starts))
    return Share(ranks, side.threads or (1 if crowded else each))


def _number(threads: int | str) -> int | None:
    return threads if isinstance(threads, int) else None


def _named(cores: Sequence[int]) -> str:
    """Write cores in ascending order as ``cores 0-3,8``."""
    runs = itertools.groupby(enumerate(cores), lambda pair: pair[1] - pair[0])
    ends = [[core for _, core in run] for _, run in runs]
    ranges = (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)
    return f"{'core' if len(cores) == 1 else 'cores'} {','.join(ranges)}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
