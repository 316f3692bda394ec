"""Accuracy over repeated samples, as a run's metrics: the values of `statistics`, without their intervals."""

from __future__ import annotations

from megatron_hpt.evaluation import statistics
from megatron_hpt.evaluation.statistics import Scores


def average_at_k(rewards: Scores) -> float | None:
    """avg@k: mean over prompts of the mean reward of their graded answers; None if nothing was graded."""
    found = statistics.average_at_k(rewards)
    return None if found is None else found.value


def solved_share(rewards: Scores) -> float | None:
    """Share of prompts with at least one correct answer among the k sampled (pass@k with n = k)."""
    found = statistics.solved_at_least_once(rewards)
    return None if found is None else found.value
