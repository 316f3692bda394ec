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


@dataclass(frozen=True)
class ReferenceSrftClip:
    """The clip of the reference's SRFT as it runs: it clamps log π_θ, not a ratio (mix_core_alg.py:581).

    Since log π_θ < 1 - low, the bound is always 1 - low, and rows with a negative advantage lose all their gradient.
    """

    low: float
    high: float
    surrogate: ClassVar[str | None] = None

    @property
    def formula(self) -> str:
        return f"reference SRFT clip: bound clip(log π_θ, {1 - self.low:g}, {1 + self.high:g})"

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        bound = tokens.logprobs.detach().clamp(1 - self.low, 1 + self.high)
        kept = surrogate.detach() * advantages <= bound * advantages
        return Stabilised(torch.where(kept, surrogate, bound), kept)


@dataclass(frozen=True)
class Bounded:
    """The surrogate itself is clamped, whatever the advantage (the reference's off_policy_max_clip and min_clip)."""

    low: float | None = None
    high: float | None = None
    surrogate: ClassVar[str | None] = None

    @property
    def formula(self) -> str:
        return f"bounded: {self.low if self.low is not None else '-∞'} ≤ r ≤ {self.high if self.high is not None else '∞'}"

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        bound = surrogate.detach().clamp(self.low, self.high)
        kept = bound == surrogate
        return Stabilised(torch.where(kept, surrogate, bound), kept)


@dataclass(frozen=True)
class DropLikely:
    """Tokens that the policy already gives more than `above` do not train (the reference's all_max_clip)."""

    above: float
    inner: Stability
    surrogate: ClassVar[str | None] = None

    @property
    def formula(self) -> str:
        return f"π_θ ≤ {self.above:g} and {self.inner.formula}"

    def __call__(self, surrogate: Tensor, advantages: Tensor, tokens: Tokens) -> Stabilised:
        value, kept = self.inner(surrogate, advantages, tokens)
        unlikely = tokens.logprobs.detach().exp() <= self.above
        return Stabilised(torch.where(unlikely, value, 0.0), kept & unlikely)
