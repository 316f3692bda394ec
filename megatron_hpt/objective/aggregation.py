"""Aggregations: how the tokens of a term become one number.

Each gives the weight of every token as a function of global counts (over all micro-batches and ranks) that are known
before the first forward. A loss is then a plain sum, and it does not matter how the batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Counts:
    """Trained response tokens and rows of one term in the whole batch."""

    tokens: int = 0
    rows: int = 0


class Aggregation(Protocol):
    """A choice of weights."""

    def __call__(self, row_lengths: Tensor, counts: Counts) -> Tensor:
        """Weight of each token, [tokens].

        Args:
            row_lengths: response length of the row that each token belongs to, [tokens].
            counts: the term's global counts; positive wherever there are tokens.
        """


@dataclass(frozen=True)
class TokenMean:
    """Every token counts the same: 1 / Σ lengths."""

    def __call__(self, row_lengths: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(row_lengths, 1.0 / max(counts.tokens, 1))


@dataclass(frozen=True)
class SequenceMean:
    """Every row counts the same: 1 / (rows · its own length), as in GRPO."""

    def __call__(self, row_lengths: Tensor, counts: Counts) -> Tensor:
        return 1.0 / (row_lengths.clamp(min=1) * max(counts.rows, 1))


@dataclass(frozen=True)
class ConstantLength:
    """1 / (rows · L) with a constant L: no bias towards short correct or long wrong answers (Dr. GRPO)."""

    length: int

    def __call__(self, row_lengths: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(row_lengths, 1.0 / (max(counts.rows, 1) * self.length))
