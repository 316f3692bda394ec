"""avg@k and pass@k of repeated samples, with confidence intervals. The functions are pure and need numpy only.

Problems are the sampling unit: they stand for all problems of their kind, and the samples of one problem belong together
(Miller 2024, arXiv 2411.00640, section 3.1: errors are computed over the means of problems). So every metric is a mean over
problems of a value, in [0, 1] where scores are, and one interval serves all of them.

A sample without a grade is left out, and so is a problem that has too few graded samples; both are counted, neither is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Scores = Sequence[Sequence[float | None]]
"""For each problem the scores of its samples; None: ungraded."""
CORRECT = 1.0
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, with its confidence interval."""

    value: float
    low: float
    high: float
    problems: int
    left_out: int = 0
    """How many problems had too few graded samples."""


def graded(scores: Sequence[float | None]) -> list[float]:
    """Return the scores of one problem's graded samples."""
    return [score for score in scores if score is not None]


def ungraded(scores: Scores) -> int:
    """Count the samples without a grade."""
    return sum(score is None for problem in scores for score in problem)


def average_at_k(scores: Scores, confidence: float = CONFIDENCE) -> Estimate | None:
    """Estimate avg@k, the mean over problems of the mean score of their graded samples. None if nothing was graded."""
    return estimate([np.mean(known) if (known := graded(problem)) else None for problem in scores], confidence)


def pass_at_k(scores: Scores, k: int, confidence: float = CONFIDENCE) -> Estimate | None:
    """Estimate pass@k, the mean over problems of the probability that one of k samples is correct.

    Problems with fewer than k graded samples are left out: for them there is no unbiased estimate.

    Returns:
        None if no problem has k graded samples.
    """
    return estimate([_pass(graded(problem), k) for problem in scores], confidence)


def solved_at_least_once(scores: Scores, confidence: float = CONFIDENCE) -> Estimate | None:
    """Estimate the share of problems with a correct sample among those graded: pass@n with every problem's own n."""
    return estimate([float(CORRECT in known) if (known := graded(problem)) else None for problem in scores], confidence)


def _pass(known: Sequence[float], k: int) -> float | None:
    return pass_probability(len(known), sum(score == CORRECT for score in known), k) if len(known) >= k else None


def pass_probability(n: int, correct: int, k: int) -> float:
    """Estimate without bias the probability that one of k samples is correct, from n samples: 1 − C(n−c, k) / C(n, k).

    Chen et al. 2021, arXiv 2107.03374, eq. 1, as a product of factors in [0, 1], which no n makes overflow.

    Raises:
        ValueError: not 1 ≤ k ≤ n, or not 0 ≤ correct ≤ n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} correct among {n}: k and the correct ones are at most n, and k at least 1")
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def powers_of_two(n: int) -> list[int]:
    """Return 1, 2, 4 … up to n, and n itself."""
    return sorted({2**exponent for exponent in range(n.bit_length())} | {n}) if n else []


def estimate(values: Sequence[float | None], confidence: float = CONFIDENCE) -> Estimate | None:
    """Compute the mean over problems, and its interval.

    Args:
        values: one for each problem; None leaves the problem out.

    Returns:
        None if every problem was left out.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not known.size:
        return None
    low, high = interval(known, confidence)
    return Estimate(float(known.mean()), low, high, known.size, len(values) - known.size)


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Compute a confidence interval of the mean of independent values.

    Of values in [0, 1] Wilson's, with the number of values replaced by the effective sample size p(1−p) / SE², SE being the
    standard error over values (Franco, Little, Louis, Slud 2019, doi 10.1093/jssam/smy019, recommend it for proportions of
    clusters), and with Student's quantile for so many values. It stays within [0, 1], and values that are all alike do not
    make it a point: they count as that many yes-or-no answers. With one sample a problem it is Wilson's own but for n−1 and
    the quantile. Normal intervals fail on 30 hard problems: docs/compare.md has the coverage of both. Of other values it is
    Student's.

    Args:
        values: float64 [problems].
    """
    n, p = values.size, float(values.mean())
    is_share = bool(((values >= 0) & (values <= 1)).all())
    if n == 1:
        return (0.0, 1.0) if is_share else (-math.inf, math.inf)
    squared_error = float(values.var(ddof=1)) / n
    q = student_quantile(0.5 + confidence / 2, n - 1)
    if not is_share:
        return p - q * math.sqrt(squared_error), p + q * math.sqrt(squared_error)
    effective = p * (1 - p) / squared_error if squared_error > 1e-15 else n
    shrunk = 1 + q * q / effective
    centre = (p + q * q / (2 * effective)) / shrunk
    half = q * math.sqrt(p * (1 - p) / effective + (q / (2 * effective)) ** 2) / shrunk
    return max(0.0, centre - half), min(1.0, centre + half)


def student_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t (Abramowitz and Stegun 26.7.5; in closed form for 1 and 2 degrees of freedom)."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """Compute the unweighted mean of independent estimates, which is the Avg of several benchmarks.

    Its interval is made of theirs: the distances of their ends are added as standard errors are (Zou and Donner 2008, doi
    10.1002/sim.3095), which keeps the asymmetry of each.
    """
    value = math.fsum(part.value for part in parts) / len(parts)
    down = math.sqrt(math.fsum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    up = math.sqrt(math.fsum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    problems, left_out = (sum(getattr(part, name) for part in parts) for name in ("problems", "left_out"))
    return Estimate(value, value - down, value + up, problems, left_out)
