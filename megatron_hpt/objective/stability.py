"""Stabilisation masks: which tokens keep their gradient (1_stable in arXiv 2509.04419, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Stability(Protocol):
    """A choice of mask."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Mask of each token, [tokens], bool; no gradient passes through it."""


@dataclass(frozen=True)
class NoMask:
    """Every token keeps its gradient."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return torch.ones_like(advantages, dtype=torch.bool)


@dataclass(frozen=True)
class Clip:
    """PPO's trust region: off where the ratio has already left it in the direction the advantage pushes.

    The derivative of min(r·Â, clip(r, 1-ε_low, 1+ε_high)·Â) is Â·r' inside this mask and zero outside
    (arXiv 1707.06347, eq. 7).
    """

    low: float = 0.2
    high: float = 0.2

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        ratio = (logprobs.detach() - old_logprobs).exp()
        too_far_up = (advantages > 0) & (ratio > 1 + self.high)
        too_far_down = (advantages < 0) & (ratio < 1 - self.low)
        return ~(too_far_up | too_far_down)
