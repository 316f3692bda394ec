"""The order in which a search looks at trainers and engines together. Pure; no torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_hpt.config import Config
from megatron_hpt.plan.search.candidates import Placement

SAME = 0.99
"""Share of its time that a layout may gain by a slower trainer, as a simulation of a few steps has it."""


@dataclass(frozen=True)
class Pair:
    """A trainer and engines, not yet simulated."""

    least: float
    """Seconds that it does not beat."""
    layout: Config


class Queue:
    """Pairs by rising least time; those of a placement are asked for when its turn comes."""

    def __init__(
        self,
        bounds: list[tuple[float, Placement, int]],
        pairs: Callable[[Placement, int], Iterator[Iterator[Pair]]],
    ) -> None:
        self._bounds = sorted(bounds, key=lambda bound: bound[0], reverse=True)
        self._pairs = pairs
        self._waiting: list[tuple[float, int, Pair]] = []
        self._chains: dict[int, Iterator[Pair]] = {}
        """Trainers beside the same engines, of which one waits: a slower trainer makes no step quicker."""
        self._number = 0

    def next(self) -> Pair | None:
        """Take the pair with the least time away; None: there is none left."""
        while self._bounds and not (self._waiting and self._waiting[0][0] <= self._bounds[-1][0]):
            _, placement, lag = self._bounds.pop()
            for chain in self._pairs(placement, lag):
                self._push(chain, 0.0)
        return heapq.heappop(self._waiting)[2] if self._waiting else None

    def go_on(self, pair: Pair, seconds: float) -> None:
        """Let the next trainer beside the engines of a pair wait, which takes no less than this one."""
        self._push(self._chains.pop(id(pair)), SAME * seconds)

    def _push(self, chain: Iterator[Pair], least: float) -> None:
        if pair := next(chain, None):
            self._number += 1
            self._chains[id(pair)] = chain
            heapq.heappush(self._waiting, (max(pair.least, least), self._number, pair))
