"""Components of the reference code that no algorithm here has: `tools/reference_vectors` check the estimator with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_hpt.objective.shaping import Shaping
from megatron_hpt.objective.stability import Stabilised, Stability
from megatron_hpt.objective.tokens import Tokens


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


@dataclass(frozen=True)
class Teacher:
    """π_ref = the probability of whoever wrote the demonstration, where it is known (LUFFY's π_φ)."""

    epsilon: float = 0.0
    symbol: ClassVar[str] = "π_φ"
    surrogate: ClassVar[str] = "f(π_θ/π_φ)"
    shapes: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return shaping(tokens.logprobs - (tokens.behaviour_logprobs.exp() + self.epsilon).log())


@dataclass(frozen=True)
class OldShaped:
    """The ratio of shaped probabilities f(π_θ)/f(π_θold), as the reference reshapes rollouts with p/(p+c)."""

    symbol: ClassVar[str] = "f(π_θold)"
    surrogate: ClassVar[str] = "f(π_θ)/f(π_θold)"
    shapes: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return shaping(tokens.logprobs) / shaping(old_logprobs)


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


@dataclass(frozen=True)
class Absolute:
    """The reference code's `abs`; an estimate of no divergence, kept to check its numbers."""

    formula: str = "|d|"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.abs()


def reference_bessel(number: int) -> float:
    """Return n / (n - 1) in single precision, as in verl's masked_var."""
    return (torch.tensor(float(number)) / (number - 1)).item()
