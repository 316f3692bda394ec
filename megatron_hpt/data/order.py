"""The data order: pure functions of seed and position, so that nothing has to be saved to go on from anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megatron_hpt.errors import DataError

Stage = Sequence[range]
"""Ranges of rows that are shuffled among each other."""


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Shuffle:
    """Draws from the rows of one source: every epoch has each row once, in an order of its own.

    The stages of a source are gone through in order, each shuffled within itself; a source of one stage is shuffled as a whole.
    """

    def __init__(self, stages: Sequence[Stage], seed: Sequence[int]) -> None:
        self._stages, self._seed = stages, seed
        self._ends = np.cumsum([sum(map(len, stage)) for stage in stages])
        self._order = lru_cache(2)(self._permuted)

    @property
    def rows(self) -> int:
        """Of an epoch."""
        return int(self._ends[-1])

    def at(self, draw: int) -> int:
        """The row that a draw gives; draws are counted from the first epoch's first."""
        epoch, place = divmod(draw, self.rows)
        stage = int(np.searchsorted(self._ends, place, side="right"))
        return int(self._order(epoch, stage)[place - (self._ends[stage - 1] if stage else 0)])

    def _permuted(self, epoch: int, stage: int) -> np.ndarray:
        """int32 or int64 [rows of the stage]."""
        width = np.int32 if self.rows < 2**31 else np.int64
        rows = np.concatenate([np.arange(part.start, part.stop, dtype=width) for part in self._stages[stage]])
        np.random.default_rng((*self._seed, epoch, stage)).shuffle(rows)
        return rows


class Mixture:
    """Which source a position draws from, in proportion to weights.

    Positions come in cycles of `CYCLE`, in each of which every source has the same number of places, shuffled among each
    other. So the number of a source's draws before a position is known without counting them.
    """

    CYCLE = 10_000

    def __init__(self, weights: Sequence[float], seed: Sequence[int]) -> None:
        """Args:
            weights: of the sources, in any unit.

        Raises:
            DataError: a weight is so small that its source would never be drawn from.
        """
        self._seed = seed
        self._quotas = _apportioned(weights, self.CYCLE)
        if min(self._quotas) == 0:
            raise DataError(
                f"data.train: given the weights {', '.join(f'{weight:g}' for weight in weights)}; "
                f"the smallest must be at least 1/{self.CYCLE} of their sum"
            )
        self._places = lru_cache(2)(self._arranged)

    @property
    def shares(self) -> list[float]:
        """Share of the positions that each source has."""
        return [quota / self.CYCLE for quota in self._quotas]

    def at(self, position: int) -> tuple[int, int]:
        """Source, and number of its draw."""
        cycle, place = divmod(position, self.CYCLE)
        sources, before = self._places(cycle)
        source = int(sources[place])
        return source, cycle * self._quotas[source] + int(before[place])

    def _arranged(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place, and how many places of the same source come before it in the cycle."""
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        if len(self._quotas) > 1:
            np.random.default_rng((*self._seed, cycle)).shuffle(sources)
        before = np.empty(self.CYCLE, dtype=np.int64)
        for source, quota in enumerate(self._quotas):
            before[sources == source] = np.arange(quota)
        return sources, before


def _apportioned(weights: Sequence[float], seats: int) -> list[int]:
    """Whole numbers in proportion to weights that sum to `seats` (largest remainders)."""
    exact = [seats * weight / sum(weights) for weight in weights]
    floors = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: floors[index] - exact[index])
    for index in by_remainder[: seats - sum(floors)]:
        floors[index] += 1
    return floors
