"""Shaping of the likelihood: a function applied to the surrogate before it is differentiated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Shaping(Protocol):
    """A choice of shaping."""

    def __call__(self, surrogate: Tensor) -> Tensor:
        """Shaped surrogate, [tokens], differentiable."""


@dataclass(frozen=True)
class Identity:
    """No shaping."""

    def __call__(self, surrogate: Tensor) -> Tensor:
        return surrogate
