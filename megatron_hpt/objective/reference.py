"""Reference-policy denominators: the π_ref in mask · 1/π_ref · Â · ∇π_θ.

Each gives the surrogate of every token: a differentiable function whose derivative by log π_θ is the weight of
∇ log π_θ. Without shaping that weight is π_θ/π_ref. (arXiv 2509.04419, section 2.2 and table 1.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from megatron_hpt.objective.shaping import Shaping
from megatron_hpt.objective.tokens import Tokens


class Reference(Protocol):
    """A choice of π_ref."""

    symbol: ClassVar[str]
    surrogate: ClassVar[str]
    """The formula; f is the shaping."""
    shapes: ClassVar[bool]
    """False: π_ref = π_θ leaves nothing to shape."""

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        """Surrogate, [tokens].

        Args:
            old_logprobs: log π_θold, [tokens], without gradient.
            shaping: applied to the logarithm of π_θ/π_ref.
        """


@dataclass(frozen=True)
class Current:
    """π_ref = π_θ: SFT and REINFORCE. The weight is one; the surrogate is log π_θ, so SFT's value is a likelihood."""

    symbol: ClassVar[str] = "π_θ"
    surrogate: ClassVar[str] = "log π_θ"
    shapes: ClassVar[bool] = False

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return tokens.logprobs


@dataclass(frozen=True)
class Old:
    """π_ref = π_θold, the policy that sampled: the PPO family."""

    symbol: ClassVar[str] = "π_θold"
    surrogate: ClassVar[str] = "f(π_θ/π_θold)"
    shapes: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return shaping(tokens.logprobs - old_logprobs)


@dataclass(frozen=True)
class OldSequence:
    """GSPO (arXiv 2507.18071): every token has its sequence's ratio s = exp(mean_t log π_θ/π_θold).

    Under `SequenceMean` its derivative on token t is s · Â / |y|, that is π_ref = π_θ · (π_θold(y)/π_θ(y))^(1/|y|).
    """

    symbol: ClassVar[str] = "π_θ·(π_θold(y)/π_θ(y))^1/|y|"
    surrogate: ClassVar[str] = "f((π_θ(y)/π_θold(y))^1/|y|)"
    shapes: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return shaping(tokens.row_mean(tokens.logprobs - old_logprobs))


@dataclass(frozen=True)
class One:
    """π_ref = 1: off-policy RL on demonstrations whose writer's probabilities are unknown (LUFFY, SRFT)."""

    symbol: ClassVar[str] = "1"
    surrogate: ClassVar[str] = "f(π_θ)"
    shapes: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, old_logprobs: Tensor, shaping: Shaping) -> Tensor:
        return shaping(tokens.logprobs)
