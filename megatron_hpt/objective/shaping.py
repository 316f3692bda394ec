"""Shaping of the likelihood: a function f of x = π_θ/π_ref, applied before it is differentiated.

All take log x, which neither underflows nor divides. Weights and derivatives: seed of LUFFY (arXiv 2504.14945) and
the reference code's `off_policy_reshape`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Shaping(Protocol):
    """A choice of f."""

    @property
    def formula(self) -> str:
        """f(x), for people."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        """f(exp(log_ratio)), [tokens], differentiable."""


@dataclass(frozen=True)
class Identity:
    """f(x) = x."""

    formula: str = "x"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp()


@dataclass(frozen=True)
class Saturating:
    """f(x) = x / (x + γ): lifts the weight of unlikely tokens (LUFFY). f'(x) = γ / (x + γ)²."""

    gamma: float

    @property
    def formula(self) -> str:
        return f"x/(x+{self.gamma:g})"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return torch.sigmoid(log_ratio - math.log(self.gamma))


@dataclass(frozen=True)
class Logarithm:
    """f(x) = w · log x."""

    weight: float = 1.0

    @property
    def formula(self) -> str:
        return f"{self.weight:g}·log x"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.weight * log_ratio


@dataclass(frozen=True)
class PlusLogarithm:
    """f(x) = x + w · log x."""

    weight: float

    @property
    def formula(self) -> str:
        return f"x + {self.weight:g}·log x"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() + self.weight * log_ratio


@dataclass(frozen=True)
class Power:
    """f(x) = x^e."""

    exponent: float = 0.5

    @property
    def formula(self) -> str:
        return f"x^{self.exponent:g}"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return (self.exponent * log_ratio).exp()


@dataclass(frozen=True)
class Uncertain:
    """f(x) = x - x²/2, whose weight on ∇ log π is x(1 - x): most for tokens the policy is unsure of (CHORD's φ)."""

    formula: str = "x - x²/2"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        x = log_ratio.exp()
        return x - x.square() / 2


@dataclass(frozen=True)
class Rejection:
    """The reference's classic_reject_token: f(x) = κx, κ = 0 where the draw u < 1 - x, else 1/x (held constant).

    The draws, uniform on [0, 1), are given, so that a loss stays a function of its inputs.
    """

    draws: Tensor
    formula: str = "x·1[u ≥ 1-x]/sg(x)"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        x = log_ratio.exp()
        constant = x.detach()
        accepted = (self.draws >= 1 - constant) & (constant > 0)
        return torch.where(accepted, x / constant.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
