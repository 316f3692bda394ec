"""Stabilisation masks: which tokens keep their gradient (1_stable in arXiv 2509.04419, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_hpt.objective.tokens import Tokens


class Stabilised(NamedTuple):
    """A surrogate after the mask."""

    surrogate: Tensor
    """[tokens]; where the mask is off, a constant: what the published loss has there, so that values agree too."""
    kept: Tensor
    """bool [tokens]: the mask."""


class Stability(Protocol):
    """A choice of mask."""

    surrogate: ClassVar[str | None]
    """The surrogate's formula, where the mask makes another of it."""

    @property
    def formula(self) -> str:
        """When a token keeps its gradient, for people; r is the surrogate."""

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        """Mask a surrogate, [tokens]."""


@dataclass(frozen=True)
class NoMask:
    """Every token keeps its gradient."""

    formula: str = "1"
    surrogate: ClassVar[str | None] = None

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        return Stabilised(surrogate, torch.ones_like(surrogate, dtype=torch.bool))


@dataclass(frozen=True)
class Clip:
    """PPO's trust region: off where the ratio has already left it in the direction the advantage pushes.

    min(r·Â, clip(r, 1-low, 1+high)·Â) (arXiv 1707.06347, eq. 7); with `dual`, additionally at least dual·Â where the
    advantage is negative (arXiv 1912.09729, eq. 5).
    """

    low: float
    high: float
    dual: float | None = None
    name: str = "clip"
    surrogate: ClassVar[str | None] = None

    @property
    def formula(self) -> str:
        dual = f", and not (Â<0, r>{self.dual:g})" if self.dual is not None else ""
        return f"{self.name}: not (Â>0, r>{1 + self.high:g}) and not (Â<0, r<{1 - self.low:g}){dual}"

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        ratio = surrogate.detach()
        bound = ratio.clamp(1 - self.low, 1 + self.high)
        kept = ratio * advantages <= bound * advantages
        if self.dual is not None:
            beyond = (advantages < 0) & (ratio > self.dual)
            bound, kept = torch.where(beyond, self.dual, bound), kept & ~beyond
        return Stabilised(torch.where(kept, surrogate, bound), kept)


@dataclass(frozen=True)
class CisMask:
    """CISPO's clipped importance weight (arXiv 2506.13585, eq. 4): no token loses its gradient, its weight is bounded.

    The surrogate is sg(clip(r, 1-low, 1+high)) · log π_θ; `low` None leaves the lower side open, as published. `kept`
    tells where the weight was not bounded.
    """

    high: float
    low: float | None = None
    surrogate: ClassVar[str | None] = "sg(clip(π_θ/π_θold)) · log π_θ"

    @property
    def formula(self) -> str:
        low = f"{1 - self.low:g}" if self.low is not None else "0"
        return f"cis: weight sg(clip(r, {low}, {1 + self.high:g}))"

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        ratio = surrogate.detach()
        weight = ratio.clamp(None if self.low is None else 1 - self.low, 1 + self.high)
        return Stabilised(weight * tokens.logprobs, weight == ratio)
