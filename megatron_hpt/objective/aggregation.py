"""Aggregations: how the tokens of a term become one number.

Each gives the weight of every token as a function of global counts (over all micro-batches and ranks) that are known
before the first forward. A loss is then a plain sum, and it does not matter how the batch is cut. Those named
`Reference…` are the exceptions: they reproduce what the reference code computes, cut and all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hpt.objective.tokens import Counts, Tokens


class Aggregation(Protocol):
    """A choice of weights."""

    @property
    def formula(self) -> str:
        """The weight of a token, for people: N tokens, S sequences, |y| the length of its own."""

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        """Weight of each token, [tokens].

        Args:
            counted: bool [tokens], which of them the term counts.
            counts: their number in the whole batch.
        """


@dataclass(frozen=True)
class TokenMean:
    """Every token counts the same."""

    formula: str = "1/N"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(tokens.weights, 1.0 / max(counts.tokens, 1))


@dataclass(frozen=True)
class SequenceMean:
    """Every row counts the same, as in GRPO."""

    formula: str = "1/(S·|y|)"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return 1.0 / (tokens.row_lengths.clamp(min=1) * max(counts.rows, 1))


@dataclass(frozen=True)
class SequenceSum:
    """Mean over rows of the sum over tokens: the log-likelihood of whole sequences (REINFORCE, RLOO)."""

    formula: str = "1/S"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(tokens.weights, 1.0 / max(counts.rows, 1))


@dataclass(frozen=True)
class ConstantLength:
    """A constant length for all rows: no bias towards short correct or long wrong answers (Dr. GRPO)."""

    length: int

    @property
    def formula(self) -> str:
        """For people."""
        return f"1/(S·{self.length})"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(tokens.weights, 1.0 / (max(counts.rows, 1) * self.length))


@dataclass(frozen=True)
class PromptShare:
    """A term's own mean times its share of the prompts, so that every prompt weighs the same whichever side it is on.

    It is arXiv 2509.04419, eq. 13, summed over prompts: two prompts of RL beside thirty of SFT have 2/32 of the weight.
    """

    inner: Aggregation

    @property
    def formula(self) -> str:
        """For people."""
        return f"its share of the prompts · {self.inner.formula}"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return counts.prompt_share * self.inner(tokens, counted, counts)


@dataclass(frozen=True)
class ReferenceConstantWidth:
    """The reference's loss_remove_token_mean: a sum over a rank's rows by the padded width, averaged over ranks."""

    width: int

    @property
    def formula(self) -> str:
        """For people."""
        return f"1/({self.width}·ranks), summed over rows"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        return torch.full_like(tokens.weights, 1.0 / (self.width * counts.ranks))


@dataclass(frozen=True)
class ReferenceTokenMean:
    """The reference's token mean within a micro-batch, summed over micro-batches and averaged over ranks.

    `up_to` leaves tokens above that probability out of the count (all_max_clip). An empty micro-batch gives 0 where
    the reference gives 0/0.
    """

    up_to: float = 1.0
    formula: str = "1/(N of the micro-batch·ranks)"

    def __call__(self, tokens: Tokens, counted: Tensor, counts: Counts) -> Tensor:
        number = (counted & (tokens.logprobs.detach().exp() <= self.up_to)).sum().clamp(min=1)
        return torch.ones_like(tokens.weights) / (number * counts.ranks)
