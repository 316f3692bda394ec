"""The metrics of an evaluation inside a run: the values of `statistics`, without their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from megatron_hpt.evaluation import statistics
from megatron_hpt.evaluation.samples import SampleRow
from megatron_hpt.evaluation.statistics import Scores


def average_at_k(rewards: Scores) -> float | None:
    """Return avg@k: mean over prompts of the mean reward of their graded answers; None if nothing was graded."""
    found = statistics.average_at_k(rewards)
    return None if found is None else found.value


def solved_share(rewards: Scores) -> float | None:
    """Return the share of prompts with at least one correct answer among the k sampled (pass@k with n = k)."""
    found = statistics.solved_at_least_once(rewards)
    return None if found is None else found.value


def average_key(name: str, samples: int) -> str:
    """Return the name of the metric of a held-out set's accuracy."""
    return f"eval/{name}/avg@{samples}"


def of_samples(name: str, samples: int, rows: Sequence[SampleRow]) -> dict[str, float | None]:
    """Compute the metrics of one held-out set.

    Args:
        samples: how many each problem has.
        rows: all samples, problem by problem.
    """
    scores = [[row.score for row in rows[first : first + samples]] for first in range(0, len(rows), samples)]
    graded = [row.score for row in rows if row.score is not None]
    return {
        average_key(name, samples): average_at_k(scores),
        f"eval/{name}/solved@{samples}": solved_share(scores),
        f"eval/{name}/accuracy": fmean(graded) if graded else None,
        f"eval/{name}/response_tokens": fmean(row.tokens for row in rows),
        f"eval/{name}/truncated": fmean(row.truncated for row in rows),
        f"eval/{name}/tokens": sum(row.tokens for row in rows),
        f"eval/{name}/ungraded": len(rows) - len(graded),
    }
