"""avg@k and pass@k against enumeration and numpy; intervals against simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.evaluation import metrics
from megatron_hpt.evaluation.statistics import (
    Estimate,
    average_at_k,
    estimate,
    interval,
    mean_of,
    pass_at_k,
    pass_probability,
    powers_of_two,
    solved_at_least_once,
    student_quantile,
    ungraded,
)

GRADES = st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), max_size=6), min_size=1, max_size=6)


@given(grades=st.lists(st.booleans(), min_size=1, max_size=9), k=st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(grades: list[bool], k: int) -> None:
    if k > len(grades):
        with pytest.raises(ValueError, match="at most n"):
            pass_probability(len(grades), sum(grades), k)
        return
    subsets = list(itertools.combinations(grades, k))
    expected = sum(map(any, subsets)) / len(subsets)
    assert pass_probability(len(grades), sum(grades), k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_thousands_of_samples_is_exact() -> None:
    """The binomial coefficients of n = 2048 are far beyond float64."""
    from fractions import Fraction
    from math import comb

    for correct, k in itertools.product((1, 3, 700, 1024, 2047), (1, 2, 32, 1024)):
        exact = 1 - Fraction(comb(2048 - correct, k), comb(2048, k))
        assert pass_probability(2048, correct, k) == pytest.approx(float(exact), rel=1e-11)


@given(grades=GRADES)
def test_ungraded_samples_are_left_out_and_counted(grades: list) -> None:
    known = [[g for g in problem if g is not None] for problem in grades]
    means = [np.mean(problem) for problem in known if problem]
    found = average_at_k(grades)
    if found is None:
        assert not means
    else:
        assert found.value == pytest.approx(np.mean(means))
        assert (found.problems, found.left_out) == (len(means), len(grades) - len(means))
    assert ungraded(grades) == sum(map(len, grades)) - sum(map(len, known))
    for k in (1, 2, 4):
        enough = [problem for problem in known if len(problem) >= k]
        found = pass_at_k(grades, k)
        assert (found.left_out if found else len(grades)) == len(grades) - len(enough)
        if enough:
            expected = np.mean([np.mean([max(s) for s in itertools.combinations(problem, k)]) for problem in enough])
            assert found.value == pytest.approx(expected)


@given(grades=GRADES)
def test_a_runs_metrics_are_the_same_numbers(grades: list) -> None:
    for metric, statistic in ((metrics.average_at_k, average_at_k), (metrics.solved_share, solved_at_least_once)):
        found = statistic(grades)
        assert metric(grades) == (None if found is None else found.value)
    graded = [[g for g in problem if g is not None] for problem in grades]
    if any(graded):
        assert metrics.solved_share(grades) == pytest.approx(np.mean([1.0 in problem for problem in graded if problem]))


def test_all_ungraded_is_no_accuracy_of_zero() -> None:
    assert average_at_k([[None, None]]) is None
    assert pass_at_k([[1.0], [0.0]], 2) is None


def test_powers_of_two_end_with_n() -> None:
    assert [powers_of_two(n) for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_quantiles_of_student_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 5: 2.57058, 10: 2.22814, 29: 2.04523, 499: 1.96473}
    for freedom, expected in table.items():
        assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=4e-3 if freedom < 5 else 2e-4)


def test_one_sample_a_problem_is_wilsons_interval() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert interval(np.repeat([1.0, 0.0], [81, 182])) == pytest.approx((0.2553, 0.3662), abs=5e-4)


@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40))
def test_an_interval_holds_its_value_and_stays_within_bounds(values: list[float]) -> None:
    found = estimate(values)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert found.high - found.low > 1e-4  # no certainty from a sample, even if all are alike
    narrow = estimate(values, 0.5)
    assert found.low <= narrow.low + 1e-12
    assert narrow.high <= found.high + 1e-12


def test_rewards_outside_0_and_1_have_a_mean_too() -> None:
    """A run's rewards may be anything; its metrics are made by the same functions."""
    assert metrics.average_at_k([[-1.0, 1.0], [-1.0], [2.5]]) == pytest.approx(0.5)
    found = estimate([-1.0, 0.0, 2.5])
    assert found.low < -1.0 < 2.5 < found.high  # three values: Student's interval is wide, and not cut
    assert mean_of([found]) == found


DIFFICULTIES = {
    "spread": lambda draws, n: draws.beta(0.3, 0.6, n),
    "easy": lambda draws, n: draws.beta(2.0, 0.3, n),
    "all alike": lambda draws, n: np.full(n, 0.5),
    "hard": lambda draws, n: draws.beta(0.1, 2.0, n),
}
LEAST = {"hard": 0.88}
"""30 problems of which nearly all have probability 0: too few to see the rare ones. A normal interval covers 0.77 there."""


@pytest.mark.parametrize("name", DIFFICULTIES)
@pytest.mark.parametrize(("problems", "k"), [(30, 1), (30, 32), (198, 8)])
def test_intervals_cover(name: str, problems: int, k: int) -> None:
    draws, trials = np.random.default_rng(3), 1500
    truth = DIFFICULTIES[name](draws, 200_000).mean()
    covered = 0
    for _ in range(trials):
        low, high = interval(draws.binomial(k, DIFFICULTIES[name](draws, problems)) / k)
        covered += low <= truth <= high
    assert LEAST.get(name, 0.93) <= covered / trials <= 0.99


def test_the_mean_of_benchmarks_is_as_sure_as_they_are_together() -> None:
    parts = [Estimate(0.2, 0.1, 0.4, 30), Estimate(0.8, 0.7, 0.85, 500, 2)]
    found = mean_of(parts)
    assert found.value == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 - (0.1**2 + 0.1**2) ** 0.5 / 2)
    assert found.high == pytest.approx(0.5 + (0.2**2 + 0.05**2) ** 0.5 / 2)
    assert (found.problems, found.left_out) == (530, 2)
