"""Two models on the same problems: exclusive solves, p-values against enumeration, coverage of the interval."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.comparison.paired import binomial_test, difference, mean_difference, paired_interval, paired_test

ONE = st.lists(st.tuples(st.sampled_from([0.0, 1.0, None]), st.sampled_from([0.0, 1.0, None])), min_size=1, max_size=12)


@given(grades=ONE)
def test_with_one_sample_exclusive_solves_are_counts(grades: list) -> None:
    found = difference([[a] for a, _ in grades], [[b] for _, b in grades])
    both = [(a, b) for a, b in grades if a is not None and b is not None]
    if found is None:
        assert not both
        return
    assert (found.plus, found.minus) == (both.count((1.0, 0.0)), both.count((0.0, 1.0)))
    assert found.value == pytest.approx((found.plus - found.minus) / len(both))
    assert (found.problems, found.left_out) == (len(both), len(grades) - len(both))
    assert found.p_value == pytest.approx(binomial_test(int(found.plus), int(found.plus + found.minus)))


@given(differences=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8))
def test_the_p_value_is_the_share_of_signs_that_do_as_well(differences: list[float]) -> None:
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(sign * abs(d) for sign, d in zip(row, differences, strict=True))) for row in signs]
    expected = np.mean([total >= abs(sum(differences)) - 1e-9 for total in sums])
    assert paired_test(np.array(differences))[0] == pytest.approx(expected)


def test_mcnemars_test_by_hand() -> None:
    """The paper's table 4, HPT against GRPO: +58, −15 of 500."""
    p, name = paired_test(np.repeat([1.0, -1.0, 0.0], [58, 15, 427]))
    assert name == "McNemar, exact"
    assert p == pytest.approx(4.0e-7, rel=0.1)
    assert binomial_test(5, 5) == 2 / 32
    assert paired_test(np.zeros(9)) == (1.0, "no problem differs")


def test_drawn_signs_agree_with_the_exact_distribution() -> None:
    differences = np.array([*[0.25] * 14, *[-0.5] * 6])  # 20 differ: too many to try all
    exact = np.zeros(1 + 26)  # of the sum in quarters, by convolution
    exact[0] = 1
    for size in [1] * 14 + [2] * 6:
        exact = (exact + np.roll(exact, size)) / 2
    total, observed = 26, abs(14 - 12)
    expected = sum(p for up, p in enumerate(exact) if abs(2 * up - total) >= observed)
    p, name = paired_test(differences)
    assert name == "random signs, 50,000 draws"
    assert p == pytest.approx(expected, abs=0.01)
    assert paired_test(differences)[0] == p


def test_under_equal_models_small_p_values_are_as_rare_as_they_say() -> None:
    draws, trials = np.random.default_rng(5), 200
    small = 0
    for _ in range(trials):
        p = draws.beta(0.3, 0.6, 30)
        small += paired_test(draws.binomial(8, p) / 8 - draws.binomial(8, p) / 8)[0] <= 0.05
    assert small / trials <= 0.08


@pytest.mark.parametrize(("problems", "k"), [(30, 1), (30, 8), (198, 1)])
def test_intervals_of_differences_cover(problems: int, k: int) -> None:
    draws, trials = np.random.default_rng(7), 1000
    covered = 0
    easy = draws.beta(3, 0.3, 200_000)
    truth = (easy - easy**1.5).mean()
    for _ in range(trials):
        p = draws.beta(3, 0.3, problems)
        low, high = paired_interval(draws.binomial(k, p) / k - draws.binomial(k, p**1.5) / k)
        covered += low <= truth <= high
    assert covered / trials >= 0.92


def test_models_that_differ_nowhere_may_still_differ() -> None:
    low, high = paired_interval(np.zeros(30))
    assert low == -high
    assert 0.05 < high < 0.1
    assert paired_interval(np.zeros(500))[1] < 0.005


def test_the_difference_of_averages_weighs_benchmarks_alike() -> None:
    small = ([[1.0]] * 2, [[0.0]] * 2)
    large = ([[0.0, 1.0]] * 8, [[1.0, 1.0]] * 8)
    found, parts = mean_difference([small, large]), [difference(*small), difference(*large)]
    assert found.value == pytest.approx((1.0 - 0.5) / 2)
    assert (found.plus, found.minus, found.problems) == (2.0, 4.0, 10)
    assert found.value - found.low == pytest.approx(sum((p.value - p.low) ** 2 for p in parts) ** 0.5 / 2)
    # Ten signs: the two of ±1/4 both against the eight of ∓1/32, or as far the other way round, or farther.
    sums = [abs(sum(row[:2]) / 4 + sum(row[2:]) / 32) for row in itertools.product((-1, 1), repeat=10)]
    assert found.p_value == pytest.approx(np.mean([total >= 0.25 - 1e-12 for total in sums]))
    assert mean_difference([small, ([[None]], [[1.0]])]) is None


def test_partial_and_negative_scores_solve_nothing() -> None:
    found = difference([[0.5, 1.0], [-1.0, -1.0]], [[0.0, 0.0], [0.5, 1.5]])
    assert (found.plus, found.minus) == (0.5, 0.0)  # half of the first one's samples are correct, none of the other's
    assert found.value == pytest.approx((0.75 - 2.0) / 2)
    assert found.low < -2.0 < found.high
