"""The KL to a reference policy, π_θ against π_ref, from one sample a token (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_hpt.objective.roles import Role


class KlEstimator(Protocol):
    """A choice of estimator."""

    @property
    def formula(self) -> str:
        """k(d), d = log π_θ - log π_ref."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """Estimate at each token.

        Args:
            log_ratio: log π_θ - log π_ref, [tokens], differentiable.
        """


@dataclass(frozen=True)
class K1:
    """Unbiased, of either sign. As a loss its gradient has mean zero: use it in the reward."""

    formula: str = "d"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio


@dataclass(frozen=True)
class K2:
    """Biased, never negative; its gradient as a loss is that of the true KL."""

    formula: str = "d²/2"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.square() / 2


@dataclass(frozen=True)
class K3:
    """Unbiased and never negative; `bound` clamps it (the reference code's low_var_kl: 10)."""

    bound: float | None = None
    formula: str = "e^-d - 1 + d"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        value = torch.expm1(-log_ratio) + log_ratio
        return value if self.bound is None else value.clamp(-self.bound, self.bound)


ESTIMATORS: dict[str, KlEstimator] = {"k1": K1(), "k2": K2(), "k3": K3()}


@dataclass(frozen=True)
class KlPenalty:
    """How the KL enters."""

    estimator: KlEstimator
    coefficient: float
    in_reward: bool = False
    """Subtracted from the reward of each rollout token before advantages are estimated; else a term of the loss."""


@dataclass(frozen=True)
class EntropyBonus:
    """The entropy of the policy, added to what is maximised."""

    coefficient: float = 0.0
    demonstrations: bool = True
    """Demonstration tokens are in it (the reference: mix_actor.py:436)."""
    target: float | None = None
    """Entropy that an adaptive coefficient steers to, nats."""
    rate: float = 0.01

    @property
    def roles(self) -> frozenset[Role]:
        """The rows in the bonus."""
        return frozenset(Role) if self.demonstrations else frozenset({Role.ROLLOUT})

    def next_coefficient(self, coefficient: float, entropy: float) -> float:
        """The coefficient after a step whose mean entropy over the bonus's rows was `entropy`.

        The dual variable of the constraint H ≥ target (arXiv 1812.05905, eq. 18), stepped in its logarithm so that it
        stays positive. `entropy` is a mean over all ranks, so they agree (in the reference each rank has its own).
        """
        if self.target is None:
            return coefficient
        return coefficient * math.exp(self.rate * (self.target - entropy))
