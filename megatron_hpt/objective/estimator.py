"""The one loss: Σ over terms of −coefficient · Σ_t weight · mask · Â · f(π_θ/π_ref) / global denominator.

Its gradient is the unified policy-gradient estimator, mask · 1/π_ref · Â · ∇π_θ (arXiv 2509.04419, eq. 6). All
denominators are global counts, so the loss of a batch is the sum of the losses of its parts however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hpt.objective.aggregation import Aggregation, TokenMean
from megatron_hpt.objective.algorithm import Algorithm, Term
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.tokens import Denominators, Tokens

ROLLOUTS = frozenset({Role.ROLLOUT})
_BESIDE_TERMS = ("loss", "entropy", "bonus_entropy", "kl", "masked", "dropped")


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of."""

    total: Tensor
    parts: dict[str, Tensor]
    """Detached scalars that add up over micro-batches and ranks, by `part_names`: the loss, every term's
    (``loss_<name>``), this part's share of the mean entropy (of all trained tokens, and of those in the bonus) and of
    the KL, rollout tokens that a stabilisation mask switched off, and those that a mismatch correction dropped."""


@dataclass(frozen=True)
class TermTokens:
    """One term before it is added up; all [tokens]."""

    active: Tensor
    """bool: the term applies."""
    losses: Tensor
    """−Â · f(π_θ/π_ref) after mask and correction, differentiable; 0 where the term does not apply."""
    surrogate: Tensor
    """f(π_θ/π_ref) before the mask."""
    kept: Tensor
    """bool: the stabilisation mask."""
    factors: Tensor
    """Of the mismatch correction."""


def part_names(algorithm: Algorithm) -> tuple[str, ...]:
    """Keys of `Loss.parts`, the same on every rank, whether it computes a loss or not."""
    return (*_BESIDE_TERMS, *(f"loss_{term.name}" for term in algorithm.terms))


def unified_loss(
    algorithm: Algorithm, tokens: Tokens, denominators: Denominators, entropy_coefficient: float | None = None
) -> Loss:
    """Loss of some rows of a batch.

    Rows of any mixture are allowed, none included: a term without tokens is an exact zero whose backward still runs,
    so no rank waits for another.

    Args:
        denominators: of the whole batch, whose rows these are some of.
        entropy_coefficient: where an adaptive coefficient stands; default: the algorithm's own.
    """
    total = tokens.logprobs.new_zeros(())
    parts = {}
    masked = dropped = torch.zeros_like(tokens.trained)
    for term in algorithm.terms:
        term_tokens = evaluate(term, tokens)
        value = _aggregate(term, term_tokens, tokens, denominators)
        total = total + value
        parts[f"loss_{term.name}"] = value
        rollout = term_tokens.active & (tokens.roles == Role.ROLLOUT)
        masked, dropped = masked | (rollout & ~term_tokens.kept), dropped | (rollout & (term_tokens.factors == 0))
    entropy = _mean_entropy(frozenset(Role), tokens, denominators)
    bonus_entropy = _mean_entropy(algorithm.entropy.roles, tokens, denominators)
    bonus = _mean_entropy(algorithm.entropy.roles, tokens, denominators, algorithm.entropy_aggregation)
    coefficient = algorithm.entropy.coefficient if entropy_coefficient is None else entropy_coefficient
    kl, penalty = _kl(algorithm, tokens, denominators)
    total = total - coefficient * bonus + penalty
    parts |= {
        "loss": total,
        "entropy": entropy,
        "bonus_entropy": bonus_entropy,
        "kl": kl,
        "masked": masked.sum(),
        "dropped": dropped.sum(),
    }
    return Loss(total, {name: parts[name].detach() for name in part_names(algorithm)})


def evaluate(term: Term, tokens: Tokens) -> TermTokens:
    """One term at every token."""
    active = tokens.of(term.roles)
    # Inputs of other tokens are replaced before exp(): an overflow there would turn 0 · inf into NaN on the way back.
    tokens = _only(tokens, active)
    old_logprobs, factors = term.correction(tokens)
    advantages = term.advantage.apply(tokens)
    surrogate = term.reference(tokens, old_logprobs, term.shaping)
    stabilised = term.stability(surrogate, advantages, tokens)
    losses = torch.where(active, -advantages * factors * stabilised.surrogate, 0.0)
    return TermTokens(active, losses, surrogate, stabilised.kept, factors)


def _only(tokens: Tokens, active: Tensor) -> Tokens:
    """The tokens with neutral values wherever a term does not apply."""

    def neutral(values: Tensor) -> Tensor:
        return torch.where(active, values, 0.0)

    return Tokens(
        logprobs=neutral(tokens.logprobs),
        entropy=neutral(tokens.entropy),
        behaviour_logprobs=neutral(tokens.behaviour_logprobs),
        advantages=neutral(tokens.advantages),
        weights=neutral(tokens.weights),
        row_lengths=tokens.row_lengths,
        rows=tokens.rows,
        roles=tokens.roles,
        old_logprobs=None if tokens.old_logprobs is None else neutral(tokens.old_logprobs),
    )


def _aggregate(term: Term, term_tokens: TermTokens, tokens: Tokens, denominators: Denominators) -> Tensor:
    shares = term.aggregation(tokens, tokens.of(term.counted), denominators.of(term.counted))
    return term.coefficient * (tokens.weights * shares * term_tokens.losses).sum()


def _mean_entropy(
    roles: frozenset[Role], tokens: Tokens, denominators: Denominators, aggregation: Aggregation | None = None
) -> Tensor:
    """This part's share of the mean entropy over the trained tokens of some roles.

    Rows count fully in it whatever their weight: a soft gate weighs what a row teaches, not the policy's spread.
    """
    counted = tokens.of(roles)
    shares = (aggregation or TokenMean())(tokens, counted, denominators.of(roles))
    return (shares * torch.where(counted, tokens.entropy, 0.0)).sum()


def _kl(algorithm: Algorithm, tokens: Tokens, denominators: Denominators) -> tuple[Tensor, Tensor]:
    """This part's share of the mean KL over rollout tokens, and of the penalty in the loss."""
    zero = tokens.logprobs.new_zeros(())
    if algorithm.kl is None or tokens.reference_logprobs is None:
        return zero, zero
    counted = tokens.of(ROLLOUTS)
    log_ratio = torch.where(counted, tokens.logprobs - tokens.reference_logprobs, 0.0)
    shares = TokenMean()(tokens, counted, denominators.of(ROLLOUTS))
    kl = (shares * torch.where(counted, algorithm.kl.estimator(log_ratio), 0.0)).sum()
    return kl, zero if algorithm.kl.in_reward else algorithm.kl.coefficient * kl
