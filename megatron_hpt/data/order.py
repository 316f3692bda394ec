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
    """What reading makes near: rows of one block are had together."""

    small: Sequence[range]
    """Rows of blocks that are read whole."""
    large: Sequence[range] = ()
    """Rows of blocks that can be read from their beginning only, as far as needed."""
    windows: int = 1
    """Parts of an epoch that are shuffled within themselves."""


def hashed(*parts: object) -> int:
    """64 bits that depend on `parts` alone, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    return hashed(*parts) / 2**64


class Shuffle:
    """Draws from the rows of one source: every epoch has each row once, in an order of its own.

    In one window, any order of the rows is as likely as any other. In several, each has its share of the small blocks, other
    ones in every epoch, and the next part of every large one; its rows are in any order.
    """

    def __init__(self, layout: BlockLayout, seed: Sequence[int]) -> None:
        """Args:
        seed: of one length for all that must differ.
        """
        self._layout, self._seed = layout, seed
        self.rows = sum(map(len, (*layout.small, *layout.large)))
        self._windows = lru_cache(2)(self._dealt)
        self._order = lru_cache(2)(self._permuted)

    def at(self, draw: int) -> int:
        """The row that a draw gives; draws are counted from the first epoch's first."""
        epoch, place = divmod(draw, self.rows)
        ends = self._windows(epoch)[1]
        window = int(np.searchsorted(ends, place, side="right"))
        return int(self._order(epoch, window)[place - (ends[window - 1] if window else 0)])

    def _dealt(self, epoch: int) -> tuple[list[list[range]], np.ndarray]:
        """Ranges of rows of each window of an epoch, and where the windows end."""
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
        """int32 or int64 [rows of the window]."""
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
