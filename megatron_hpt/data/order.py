"""The data order: pure functions of seed and position, so that nothing has to be saved to go on from anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_hpt.errors import DataError


@dataclass(frozen=True)
class BlockLayout:
    """The rows of a source by block. The rows of one block are read together, so they should be used near to each other."""

    small: Sequence[range]
    """The rows of each block that is read whole."""
    large: Sequence[range] = ()
    """The rows of each block that is too large for that; it is read from its beginning, as far as needed."""
    windows: int = 1
    """In how many parts an epoch is cut; rows are shuffled within each part."""


def hashed(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone and are the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def uniform(*parts: object) -> float:
    """Return a number in [0, 1) that depends on `parts` alone."""
    return hashed(*parts) / 2**64


class Shuffle:
    """Draws from the rows of one source: every epoch has each row once, in an order of its own.

    In one window, any order of the rows is as likely as any other. In several, each has its share of the small blocks, other
    ones in every epoch, and the next part of every large one; its rows are in any order.
    """

    def __init__(self, layout: BlockLayout, seed: Sequence[int]) -> None:
        """
        Args:
            seed: has the same length for all shuffles that must differ.
        """
        self._layout, self._seed = layout, seed
        self.rows = sum(map(len, (*layout.small, *layout.large)))
        self._windows = lru_cache(2)(self._dealt)
        self._order = lru_cache(2)(self._permuted)

    def at(self, draw: int) -> int:
        """Return the row that a draw gives. Draws are numbered from 0 and go on over the epochs."""
        epoch, place = divmod(draw, self.rows)
        ends = self._windows(epoch)[1]
        window = int(np.searchsorted(ends, place, side="right"))
        return int(self._order(epoch, window)[place - (ends[window - 1] if window else 0)])

    def _dealt(self, epoch: int) -> tuple[list[list[range]], np.ndarray]:
        """Return the ranges of rows of each window of an epoch, and the places in the epoch where the windows end."""
        small, windows = list(self._layout.small), self._layout.windows
        if windows > 1:
            order = np.random.default_rng((*self._seed, epoch)).permutation(len(small))
            small = [small[index] for index in order]
        dealt = [
            small[part * len(small) // windows : (part + 1) * len(small) // windows]
            + [rows[part * len(rows) // windows : (part + 1) * len(rows) // windows] for rows in self._layout.large]
            for part in range(windows)
        ]
        return dealt, np.cumsum([sum(map(len, ranges)) for ranges in dealt])

    def _permuted(self, epoch: int, window: int) -> np.ndarray:
        """Return the rows of a window in their order, int32 or int64 [rows of the window]."""
        width = np.int32 if self.rows < 2**31 else np.int64
        parts = [np.arange(part.start, part.stop, dtype=width) for part in self._windows(epoch)[0][window]]
        rows = np.concatenate(parts)
        np.random.default_rng((*self._seed, epoch, window + 1)).shuffle(rows)
        return rows


class SourceMixture:
    """Which source a position draws from, in proportion to weights.

    Positions come in cycles of `CYCLE`, in each of which every source has the same number of places, shuffled among each
    other. So the number of a source's draws before a position is known without counting them.
    """

    CYCLE = 10_000

    def __init__(self, weights: Sequence[float], seed: Sequence[int]) -> None:
        """
        Args:
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
        """The share of the positions that each source has."""
        return [quota / self.CYCLE for quota in self._quotas]

    def at(self, position: int) -> tuple[int, int]:
        """Return the source that a position draws from, and the number of that draw among the source's own."""
        cycle, place = divmod(position, self.CYCLE)
        sources, before = self._places(cycle)
        source = int(sources[place])
        return source, cycle * self._quotas[source] + int(before[place])

    def _arranged(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place of a cycle, and how many places of that source come before it in the cycle."""
        sources = np.repeat(np.arange(len(self._quotas)), self._quotas)
        if len(self._quotas) > 1:
            np.random.default_rng((*self._seed, cycle)).shuffle(sources)
        before = np.empty(self.CYCLE, dtype=np.int64)
        for source, quota in enumerate(self._quotas):
            before[sources == source] = np.arange(quota)
        return sources, before


def _apportioned(weights: Sequence[float], seats: int) -> list[int]:
    """Return whole numbers in proportion to weights; their sum is `seats` (method of largest remainders)."""
    exact = [seats * weight / sum(weights) for weight in weights]
    floors = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: floors[index] - exact[index])
    for index in by_remainder[: seats - sum(floors)]:
        floors[index] += 1
    return floors
