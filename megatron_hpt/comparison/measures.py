"""All metrics of a model on one benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hpt.comparison.majority import majority_at_k, votes
from megatron_hpt.comparison.outcomes import SampledProblem
from megatron_hpt.evaluation.statistics import Estimate, average_at_k, estimate, graded, pass_at_k, powers_of_two, ungraded


@dataclass(frozen=True)
class Measures:
    """The metrics of a model on one benchmark."""

    average: Estimate | None
    """None: nothing was graded."""
    passed: Mapping[int, Estimate]
    """pass@k for k = 1, 2, 4 … n."""
    majority: Mapping[int, Estimate]
    """maj@k for the same k."""
    problems: int
    k: int
    """How many samples a problem has."""
    samples: int
    """How many samples all problems have."""
    ungraded: int
    truncated: float
    """The share of all samples."""
    tokens: float
    """The mean over all samples."""


def measured(problems: Sequence[SampledProblem]) -> Measures:
    """Compute every metric of a benchmark's samples.

    A problem with fewer than k graded samples is left out of the values for k and more, and counted there as left out.
    """
    scores = [problem.scores for problem in problems]
    ks = powers_of_two(max((len(graded(one)) for one in scores), default=0))
    passed = {k: found for k in ks if (found := pass_at_k(scores, k))}
    samples = sum(len(problem.scores) for problem in problems)
    return Measures(
        average=average_at_k(scores),
        passed=passed,
        majority=_majorities(problems, ks),
        problems=len(problems),
        k=max((len(one) for one in scores), default=0),
        samples=samples,
        ungraded=ungraded(scores),
        truncated=sum(sum(problem.truncated) for problem in problems) / max(1, samples),
        tokens=math.fsum(math.fsum(problem.tokens) for problem in problems) / max(1, samples),
    )


def _majorities(problems: Sequence[SampledProblem], ks: Sequence[int]) -> dict[int, Estimate]:
    values: dict[int, list[float | None]] = {k: [] for k in ks}
    for problem in problems:
        counted = votes(problem.answers, problem.scores)
        possible = [k for k in ks if k <= counted.samples]
        found = dict(zip(possible, majority_at_k(counted, possible), strict=True)) if possible else {}
        for k in ks:
            values[k].append(found.get(k))
    return {k: found for k in ks if (found := estimate(values[k]))}
