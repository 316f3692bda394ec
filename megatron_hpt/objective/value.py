"""The critic's loss; there is no critic model yet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ValueLoss(NamedTuple):
    """Sums over the tokens given; divide by a global count."""

    total: Tensor
    clipped: Tensor
    """Tokens where the clip is the larger error."""


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLoss:
    """PPO's clipped value loss, ½ Σ max((V - R)², (clip(V, V_old ± clip) - R)²) (arXiv 1707.06347's published code).

    Args:
        values: predictions now, [tokens], differentiable; `old_values`, `returns` likewise without gradient.
    """
    plain = (values - returns).square()
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(torch.maximum(plain, bounded).sum() / 2, (bounded > plain).sum())
