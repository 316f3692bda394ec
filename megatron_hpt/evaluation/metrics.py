"""Accuracy over repeated samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def average_at_k(rewards: Sequence[Sequence[float | None]]) -> float | None:
    """avg@k: mean over prompts of the mean reward of their graded answers; None if nothing was graded."""
    means = [statistics.fmean(graded) for group in rewards if (graded := [r for r in group if r is not None])]
    return statistics.fmean(means) if means else None


def solved_share(rewards: Sequence[Sequence[float | None]]) -> float | None:
    """Share of prompts with at least one correct answer among the k sampled (pass@k with n = k)."""
    known = [any(r == 1.0 for r in group) for group in rewards if any(r is not None for r in group)]
    return statistics.fmean(known) if known else None
