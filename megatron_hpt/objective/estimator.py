"""The one loss: Σ over terms of −coefficient · Σ_t weight · mask · Â · f(surrogate) / global denominator.

Its gradient is the unified policy-gradient estimator, mask · 1/π_ref · Â · ∇π_θ (arXiv 2509.04419, eq. 6). All
denominators are global counts, so the loss of a batch is the sum of the losses of its parts however it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hpt.objective.aggregation import Counts
from megatron_hpt.objective.algorithms import Algorithm, Term


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, flat; all fields are [tokens]. Positions that are not trained have weight 0."""

    logprobs: Tensor
    """log π_θ, differentiable."""
    entropy: Tensor
    """Entropy of π_θ at each position in nats, differentiable."""
    old_logprobs: Tensor
    """log π of the policy that sampled the token (0 on demonstrations)."""
    advantages: Tensor
    """Â of the token's row."""
    weights: Tensor
    """The row's weight on response tokens, 0 elsewhere."""
    row_lengths: Tensor
    """Response length of the token's row, as a float."""
    demonstration: Tensor
    """bool: the token belongs to a demonstration."""


@dataclass(frozen=True)
class Denominators:
    """Global counts of both terms, made before the first forward."""

    rollouts: Counts
    demonstrations: Counts

    @property
    def tokens(self) -> int:
        """All trained response tokens."""
        return self.rollouts.tokens + self.demonstrations.tokens


def count(rows: Iterable[tuple[bool, int, float]]) -> Denominators:
    """Count the whole batch; rows are (is demonstration, response length, weight), weight 0 is not trained."""
    tokens, number = {True: 0, False: 0}, {True: 0, False: 0}
    for demonstration, length, weight in rows:
        if weight != 0:
            tokens[demonstration] += length
            number[demonstration] += 1
    return Denominators(Counts(tokens[False], number[False]), Counts(tokens[True], number[True]))


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of; the parts are detached and add up over micro-batches and ranks."""

    total: Tensor
    rollouts: Tensor
    demonstrations: Tensor
    entropy: Tensor
    """This part's share of the mean entropy over all trained tokens."""
    masked: Tensor
    """Rollout tokens whose gradient the stabilisation mask switched off."""


def unified_loss(algorithm: Algorithm, tokens: Tokens, denominators: Denominators) -> Loss:
    """Loss of some rows of a batch.

    Rows of any mixture are allowed, none included: a term without tokens is an exact zero whose backward still runs,
    so no rank waits for another.
    """
    rollouts, kept = _term(algorithm.rollouts, tokens, ~tokens.demonstration, denominators.rollouts)
    demonstrations, _ = _term(algorithm.demonstrations, tokens, tokens.demonstration, denominators.demonstrations)
    trained = tokens.weights != 0
    entropy = torch.where(trained, tokens.entropy, 0.0).sum() / max(denominators.tokens, 1)
    # Demonstration tokens are in the bonus, as in the reference (mix_actor.py:436).
    total = rollouts + demonstrations - algorithm.entropy_coefficient * entropy
    masked = (trained & ~tokens.demonstration & ~kept).sum()
    return Loss(total, rollouts.detach(), demonstrations.detach(), entropy.detach(), masked)


def _term(term: Term, tokens: Tokens, member: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """One term's loss and its stabilisation mask."""
    active = member & (tokens.weights != 0)
    # Inputs of other tokens are replaced before exp(): an overflow there would turn 0 · inf into NaN on the way back.
    logprobs = torch.where(active, tokens.logprobs, 0.0)
    old_logprobs = torch.where(active, tokens.old_logprobs, 0.0)
    surrogate = term.shaping(term.reference(logprobs, old_logprobs))
    kept = term.stability(logprobs, old_logprobs, tokens.advantages)
    scale = active * kept * tokens.weights * tokens.advantages * term.aggregation(tokens.row_lengths, counts)
    return -term.coefficient * (scale * surrogate).sum(), kept
