"""Advantage estimates: from the rewards of a batch to Â.

Estimators see the whole batch, most look at one group (the answers to one prompt) at a time. Ungraded rollouts
(reward None) take no part: they neither shift a mean nor receive an advantage. What an estimator cannot know before
the forward pass, because it depends on the policy, is its `apply`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hpt.objective.tokens import Tokens

Estimate = float | list[float] | None
"""Â of a row: one number, one for each response token, or None where there is no reward to estimate it from."""


@dataclass(frozen=True)
class Outcome:
    """What is known of a row when advantages are estimated."""

    group: int
    reward: float | None
    length: int
    """Response tokens."""
    demonstration: bool = False
    token_rewards: Sequence[float] | None = None
    """Reward at each response token besides `reward`, which is earned at the last one (a KL penalty)."""
    values: Sequence[float] | None = None
    """A critic's value of the state before each response token."""

    @property
    def total(self) -> float | None:
        """The sum of all rewards."""
        return None if self.reward is None else self.reward + math.fsum(self.token_rewards or ())

    def rewards(self) -> list[float]:
        """Reward of each token."""
        rewards = list(self.token_rewards or [0.0] * self.length)
        rewards[-1] += self.reward or 0.0
        return rewards


class Advantage(Protocol):
    """A choice of Â; `Estimated` has what most share."""

    needs_values: bool
    """It is estimated from a critic's values."""

    @property
    def formula(self) -> str:
        """Â_i, for people."""

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """Advantages of a batch's rows, in order."""

    def apply(self, tokens: Tokens) -> Tensor:
        """Â of every token in the loss, [tokens], from the estimated column."""


class Estimated:
    """Â is what was estimated."""

    needs_values = False

    def apply(self, tokens: Tokens) -> Tensor:
        """The estimated column."""
        return tokens.advantages


@dataclass(frozen=True)
class One:
    """Â = 1: SFT."""

    formula: str = "1"
    needs_values: bool = False

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """One, whatever the reward."""
        return [1.0] * len(outcomes)

    def apply(self, tokens: Tokens) -> Tensor:
        """One; the column may hold what another term needs."""
        return torch.ones_like(tokens.advantages)


@dataclass(frozen=True)
class Return(Estimated):
    """Â = R: REINFORCE without a baseline."""

    formula: str = "R"

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """The rewards."""
        return [o.total for o in outcomes]


@dataclass(frozen=True)
class Sign(Estimated):
    """Â = ±1 by whether the reward is positive (table 1 of arXiv 2509.04419; the reference's `grpo_balance`)."""

    formula: str = "+1 if R > 0 else -1"

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """Plus or minus one."""
        return [None if o.total is None else math.copysign(1.0, o.total) if o.total else -1.0 for o in outcomes]


@dataclass(frozen=True)
class Grouped(Estimated):
    """Compares a row with statistics of its own group.

    The statistics are over rollouts; with `union` over rollouts and demonstrations. A group of one has nothing to
    compare with.
    """

    union: bool = False

    @property
    def _group(self) -> str:
        return "G_on∪G_off" if self.union else "G"

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """Each graded row against its group."""
        seen: dict[int, list[float]] = {}
        for outcome in outcomes:
            if outcome.total is not None and (self.union or not outcome.demonstration):
                seen.setdefault(outcome.group, []).append(outcome.total)
        compare = {group: self.comparison(rewards) for group, rewards in seen.items()}
        return [None if o.total is None else compare.get(o.group, _alone)(o.total) for o in outcomes]

    def comparison(self, rewards: Sequence[float]) -> Callable[[float], float]:
        """From the rewards of a group to its members' advantages."""
        raise NotImplementedError


def _alone(reward: float) -> float:
    """A demonstration in a group without rollouts: its reward is all there is."""
    return reward


@dataclass(frozen=True)
class GroupCentred(Grouped):
    """Â = R - mean of the group (Dr. GRPO, arXiv 2503.20783)."""

    @property
    def formula(self) -> str:
        """For people."""
        return f"R - mean R_{self._group}"

    def comparison(self, rewards: Sequence[float]) -> Callable[[float], float]:
        """Distance from the mean."""
        mean = statistics.fmean(rewards)
        return lambda reward: reward - mean


@dataclass(frozen=True)
class GroupStandardised(Grouped):
    """Â = (R - mean) / (std + ε) of the group (GRPO, arXiv 2402.03300), with the unbiased standard deviation."""

    epsilon: float = 1e-6

    @property
    def formula(self) -> str:
        """For people."""
        return f"(R - mean R_{self._group}) / std R_{self._group}"

    def comparison(self, rewards: Sequence[float]) -> Callable[[float], float]:
        """Distance from the mean in standard deviations."""
        mean = statistics.fmean(rewards)
        std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        return lambda reward: (reward - mean) / (std + self.epsilon)


@dataclass(frozen=True)
class LeaveOneOut(Grouped):
    """Â = R - mean of the others in the group (RLOO, arXiv 2402.14740, eq. 8)."""

    formula: str = "R - mean R_others"

    def comparison(self, rewards: Sequence[float]) -> Callable[[float], float]:
        """Distance from the mean of the others; a group of one has Â = 0."""
        total, others = math.fsum(rewards), len(rewards) - 1
        return lambda reward: reward - (total - reward) / others if others else 0.0


@dataclass(frozen=True)
class ReferenceGroup(Grouped):
    """The reference code's `grpo` and (without `union`) `grpo_split`: a group of one has mean 0 and std 1, so Â = R.

    `grpo_split` sets a standard deviation of 0 to 1 and raises KeyError for a group without rollouts; here such a
    demonstration keeps its reward.
    """

    standardise: bool = False
    epsilon: float = 1e-6

    @property
    def formula(self) -> str:
        """For people."""
        centred = f"R - mean R_{self._group}"
        return (f"({centred}) / (std + {self.epsilon:g})" if self.standardise else centred) + ", R in a group of one"

    def comparison(self, rewards: Sequence[float]) -> Callable[[float], float]:
        """As in verl's core_algos.py and mix_core_alg.py."""
        mean, std = (statistics.fmean(rewards), statistics.stdev(rewards)) if len(rewards) > 1 else (0.0, None)
        if std == 0 and not self.union:
            std = None
        # Where it sets the deviation to 1 it adds ε in single precision.
        deviation = (torch.tensor(1.0) + self.epsilon).item() if std is None else std + self.epsilon
        scale = deviation if self.standardise else 1.0
        return lambda reward: (reward - mean) / scale


def returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Discounted sum of the rewards from each token on."""
    result, after = [], 0.0
    for reward in reversed(rewards):
        after = reward + discount * after
        result.append(after)
    return result[::-1]


def exact_bessel(number: int) -> float:
    """n / (n - 1)."""
    return number / (number - 1)


def whitened(
    rows: Sequence[Sequence[float] | None], epsilon: float = 1e-8, bessel: Callable[[int], float] = exact_bessel
) -> list[Estimate]:
    """All tokens of a batch at mean 0 and (unbiased) variance 1; None stays None."""
    flat = [value for row in rows if row is not None for value in row]
    mean = statistics.fmean(flat) if flat else 0.0
    variance = statistics.pvariance(flat, mean) * bessel(len(flat)) if len(flat) > 1 else 0.0
    scale = 1 / math.sqrt(variance + epsilon)
    return [None if row is None else [(value - mean) * scale for value in row] for row in rows]


@dataclass(frozen=True)
class BatchWhitened(Estimated):
    """REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over all tokens of the batch."""

    discount: float = 1.0
    formula: str = "(return_t - mean) / std over the batch's tokens"

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """One number a token."""
        return whitened([None if o.reward is None else returns(o.rewards(), self.discount) for o in outcomes])


def generalised(rewards: Sequence[float], values: Sequence[float], discount: float, decay: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} - V_t; the value after the last token is 0."""
    following = [*values[1:], 0.0]
    errors = [reward + discount * after - value for reward, value, after in zip(rewards, values, following, strict=True)]
    return returns(errors, discount * decay)


@dataclass(frozen=True)
class GeneralisedAdvantage(Estimated):
    """GAE (arXiv 1506.02438, eq. 16) from a critic's values, whitened over the batch's tokens as PPO does."""

    discount: float = 1.0
    decay: float = 1.0
    formula: str = "Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γV_{t+1} - V_t, whitened"
    needs_values = True

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """One number a token.

        Raises:
            ValueError: a row without values.
        """
        return whitened([None if o.reward is None else self._of(o) for o in outcomes])

    def _of(self, outcome: Outcome) -> list[float]:
        if outcome.values is None or len(outcome.values) != outcome.length:
            raise ValueError("generalised advantage estimation needs a critic's value of every response token")
        return generalised(outcome.rewards(), outcome.values, self.discount, self.decay)


@dataclass(frozen=True)
class EntropyScaled:
    """SRFT's entropy-aware weight (arXiv 2506.19767): Â · scale · exp(sign · H), H the row's mean entropy, constant.

    `only_positive` leaves rows with Â ≤ 0 as they are.
    """

    inner: Advantage
    scale: float
    sign: int
    only_positive: bool = False

    @property
    def needs_values(self) -> bool:
        """As the estimate inside."""
        return self.inner.needs_values

    @property
    def formula(self) -> str:
        """For people."""
        weight = f"{self.scale:g}·e^{'' if self.sign > 0 else '-'}H"
        inner = self.inner.formula
        return f"{weight} · ({inner}){' where it is positive' if self.only_positive else ''}"

    def estimate(self, outcomes: Sequence[Outcome]) -> list[Estimate]:
        """The estimate inside."""
        return self.inner.estimate(outcomes)

    def apply(self, tokens: Tokens) -> Tensor:
        """Scaled by the policy's entropy now."""
        advantages = self.inner.apply(tokens)
        weight = self.scale * (self.sign * tokens.row_mean(tokens.entropy.detach())).exp()
        return torch.where(advantages > 0, advantages * weight, advantages) if self.only_positive else advantages * weight
