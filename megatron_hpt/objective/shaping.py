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
class Uncertain:
    """f(x) = x - x²/2, whose weight on ∇ log π is x(1 - x): most for tokens the policy is unsure of (CHORD's φ)."""

    formula: str = "x - x²/2"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        x = log_ratio.exp()
        return x - x.square() / 2
