"""Two models on the same problems: what each solves that the other does not, and whether the difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hpt.evaluation.statistics import CONFIDENCE, CORRECT, Estimate, Scores, graded, mean_of, student_quantile

EXHAUSTIVE_UP_TO = 16
"""Problems that differ, for which every assignment of signs is tried; of more, DRAWS assignments are drawn."""
DRAWS = 50_000


@dataclass(frozen=True)
class Difference:
    """First model minus second, over the problems for which both have a grade."""

    plus: float
    """How many problems only the first solves; with several samples, the number expected with one sample of each."""
    minus: float
    """How many problems only the second solves, likewise."""
    value: float
    """The difference of avg@k."""
    low: float
    high: float
    p_value: float
    """The probability of a difference as large, in either direction, if both models were equally good at every problem."""
    test: str
    problems: int
    left_out: int
    """How many problems were left out, because one model has no graded sample of them."""


def difference(first: Scores, second: Scores, confidence: float = CONFIDENCE) -> Difference | None:
    """Compare two models, problem by problem (both in the same order).

    Returns:
        None if there is no problem for which both have a grade.
    """
    a, b = _means(first, second)
    if not a.size:
        return None
    solved_a, solved_b = _means(_correct(first), _correct(second))
    low, high = paired_interval(a - b, confidence)
    p_value, test = paired_test(a - b)
    return Difference(
        plus=float((solved_a * (1 - solved_b)).sum()),
        minus=float((solved_b * (1 - solved_a)).sum()),
        value=float((a - b).mean()),
        low=low,
        high=high,
        p_value=p_value,
        test=test,
        problems=a.size,
        left_out=len(first) - a.size,
    )


def mean_difference(pairs: Sequence[tuple[Scores, Scores]], confidence: float = CONFIDENCE) -> Difference | None:
    """Compare the unweighted means of several benchmarks; each pair has the arguments of `difference` for one benchmark.

    The interval is made as by `statistics.mean_of`; the test draws the signs of all problems together.

    Returns:
        None if there is a benchmark with nothing to compare.
    """
    parts = [difference(first, second, confidence) for first, second in pairs]
    if not parts or None in parts:
        return None
    mean = mean_of([Estimate(part.value, part.low, part.high, part.problems, part.left_out) for part in parts])
    weighted = [(a - b) / (a.size * len(parts)) for a, b in (_means(*pair) for pair in pairs)]
    p_value, test = paired_test(np.concatenate(weighted))
    plus, minus = sum(part.plus for part in parts), sum(part.minus for part in parts)
    return Difference(plus, minus, mean.value, mean.low, mean.high, p_value, test, mean.problems, mean.left_out)


def _correct(scores: Scores) -> Scores:
    """Replace scores: 1 for a correct sample, 0 for any other, whatever it scored."""
    return [[None if score is None else float(score == CORRECT) for score in problem] for problem in scores]


def _means(first: Scores, second: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean scores of the problems for which both have a grade, two float64 [problems]."""
    pairs = [(graded(a), graded(b)) for a, b in zip(first, second, strict=True)]
    known = [(float(np.mean(a)), float(np.mean(b))) for a, b in pairs if a and b]
    first_means, second_means = np.array(known, dtype=np.float64).reshape(-1, 2).T
    return first_means, second_means


def paired_interval(differences: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Compute a confidence interval of the mean of independent differences.

    Student's over problems (Miller 2024, arXiv 2411.00640, section 4.2). Where a problem is won, lost or neither (one sample
    of each), half a problem won, half a problem lost and one that is neither are added first (Agresti and Min 2005, doi
    10.1002/sim.1781), so that models that differ nowhere do not have an interval of length 0.

    Args:
        differences: float64 [problems].
    """
    n, mean, square = differences.size, float(differences.mean()), float((differences**2).mean())
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        mean, square, n = mean * n / (n + 2), (square * n + 1) / (n + 2), n + 2
    largest = 1.0 if (np.abs(differences) <= 1).all() else math.inf
    if n == 1:
        return -largest, largest
    half = student_quantile(0.5 + confidence / 2, n - 1) * math.sqrt(max(0.0, square - mean * mean) / (n - 1))
    return max(-largest, mean - half), min(largest, mean + half)


def paired_test(differences: np.ndarray) -> tuple[float, str]:
    """Return the two-sided p-value of "each difference could as well have the other sign", and the name of the test.

    Were both models equally good at every problem, exchanging them there would change nothing: so the sum of the differences
    is compared with its distribution over random signs (Fisher's test). With one sample of each this is McNemar's exact test.
    """
    sizes = np.abs(differences[differences != 0])
    if not sizes.size:
        return 1.0, "no problem differs"
    if (sizes == sizes[0]).all():
        name = "McNemar, exact" if sizes[0] == 1 else "random signs, exact"
        return binomial_test(int((differences > 0).sum()), sizes.size), name
    observed = abs(float(differences.sum())) - 1e-9 * float(sizes.sum())  # sums that are equal but for rounding are
    if sizes.size <= EXHAUSTIVE_UP_TO:
        signs = 1 - 2.0 * (np.arange(2**sizes.size)[:, None] >> np.arange(sizes.size) & 1)
        return float((np.abs(signs @ sizes) >= observed).mean()), "random signs, exact"
    draws = np.random.default_rng(0)
    hits = sum(
        int((np.abs((1 - 2.0 * draws.integers(0, 2, (1000, sizes.size))) @ sizes) >= observed).sum())
        for _ in range(DRAWS // 1000)
    )
    return (hits + 1) / (DRAWS + 1), f"random signs, {DRAWS:,} draws"


def binomial_test(wins: int, games: int) -> float:
    """Return the exact two-sided p-value of `wins` heads in `games` throws of a fair coin."""
    tail = sum(math.comb(games, heads) for heads in range(min(wins, games - wins) + 1))
    return min(1.0, 2 * tail / 2**games)
