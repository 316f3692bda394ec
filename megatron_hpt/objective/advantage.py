"""Advantage estimates: one number a row, from the rewards of its group (the n rollouts of one prompt).

Ungraded rollouts (reward None) take no part: they neither shift the mean nor receive an advantage.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Advantage(Protocol):
    """A choice of Â."""

    def __call__(self, rewards: Sequence[float | None]) -> list[float | None]:
        """Advantages of one group in order; None where the reward is None."""


@dataclass(frozen=True)
class One:
    """Â = 1: SFT."""

    def __call__(self, rewards: Sequence[float | None]) -> list[float | None]:
        return [None if r is None else 1.0 for r in rewards]


@dataclass(frozen=True)
class GroupCentred:
    """Â = R - mean of the group (Dr. GRPO, arXiv 2503.20783). A group of one has Â = 0: nothing to compare with."""

    def __call__(self, rewards: Sequence[float | None]) -> list[float | None]:
        graded = [r for r in rewards if r is not None]
        mean = statistics.fmean(graded) if graded else 0.0
        return [None if r is None else r - mean for r in rewards]


@dataclass(frozen=True)
class GroupStandardised:
    """Â = (R - mean) / (std + ε) of the group (GRPO, arXiv 2402.03300), with the unbiased standard deviation."""

    epsilon: float = 1e-6

    def __call__(self, rewards: Sequence[float | None]) -> list[float | None]:
        graded = [r for r in rewards if r is not None]
        std = statistics.stdev(graded) if len(graded) > 1 else 0.0
        return [None if c is None else c / (std + self.epsilon) for c in GroupCentred()(rewards)]
