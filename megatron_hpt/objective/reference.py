"""Reference-policy denominators: the π_ref in mask · 1/π_ref · Â · ∇π_θ.

Each returns a surrogate whose gradient with respect to log π_θ is π_θ/π_ref; where π_ref = π_θ that weight is one and
the surrogate is log π_θ itself, so that the value of an SFT term reads as a negative log-likelihood.
(arXiv 2509.04419, section 2.2 and table 1.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Reference(Protocol):
    """A choice of π_ref."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        """Surrogate of each token.

        Args:
            logprobs: log π_θ of the tokens, [tokens], differentiable.
            old_logprobs: log π of the policy that sampled them, [tokens]; unused where there was none.
        """


@dataclass(frozen=True)
class Current:
    """π_ref = π_θ: SFT and REINFORCE."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        return logprobs


@dataclass(frozen=True)
class Old:
    """π_ref = π_θold, the policy that sampled: the PPO family."""

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        return (logprobs - old_logprobs).exp()
