"""Advantage estimators against their definitions, and the table's records."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.objective import advantage as a

REWARDS = st.lists(st.sampled_from([0.0, 1.0, None]), min_size=1, max_size=16)
GRADES = st.lists(st.floats(-3, 3), min_size=2, max_size=16)
GROUPED = (a.GroupCentred(), a.GroupStandardised(), a.LeaveOneOut(), a.ReferenceGroup(), a.ReferenceGroup(standardise=True))


def group(rewards: list, number: int = 0, **known) -> list[a.Outcome]:
    return [a.Outcome(number, reward, 3, **known) for reward in rewards]


def close(values: list) -> object:
    return pytest.approx(values, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", GROUPED, ids=lambda e: e.formula)
@given(rewards=REWARDS)
def test_ungraded_rollouts_neither_shift_nor_receive_an_advantage(estimator: a.Advantage, rewards: list) -> None:
    advantages = estimator.estimate(group(rewards))
    assert [x is None for x in advantages] == [r is None for r in rewards]
    assert [x for x in advantages if x is not None] == estimator.estimate(group([r for r in rewards if r is not None]))


@given(rewards=GRADES)
def test_group_advantages_equal_their_definition(rewards: list) -> None:
    mean, std, n = statistics.fmean(rewards), statistics.stdev(rewards), len(rewards)
    assert a.GroupCentred().estimate(group(rewards)) == close([r - mean for r in rewards])
    assert a.GroupStandardised().estimate(group(rewards)) == close([(r - mean) / (std + 1e-6) for r in rewards])
    others = [statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i in range(n)]
    assert a.LeaveOneOut().estimate(group(rewards)) == close([r - o for r, o in zip(rewards, others, strict=True)])


@pytest.mark.parametrize("estimator", GROUPED[:3], ids=lambda e: e.formula)
def test_a_group_of_one_teaches_nothing(estimator: a.Advantage) -> None:
    assert estimator.estimate(group([1.0])) == [0.0]


@pytest.mark.parametrize("estimator", GROUPED, ids=lambda e: e.formula)
@given(first=REWARDS, second=REWARDS)
def test_groups_do_not_see_each_other(estimator: a.Advantage, first: list, second: list) -> None:
    apart = estimator.estimate(group(first)) + estimator.estimate(group(second))
    assert estimator.estimate(group(first, 0) + group(second, 1)) == apart


@given(rollouts=GRADES, demonstration=st.floats(-1, 1))
def test_the_union_compares_with_the_demonstration(rollouts: list, demonstration: float) -> None:
    rows = group(rollouts) + group([demonstration], demonstration=True)
    everyone = [*rollouts, demonstration]
    mean, std = statistics.fmean(everyone), statistics.stdev(everyone)
    ours = a.GroupStandardised(union=True).estimate(rows)
    assert ours == close([(r - mean) / (std + 1e-6) for r in everyone])
    alone = a.GroupStandardised().estimate(rows)  # scored against the rollouts' statistics
    assert alone[:-1] == a.GroupStandardised().estimate(group(rollouts))


def test_fixed_advantages() -> None:
    rows = group([1.0, 0.0, -1.0, 0.3, None])
    assert a.Sign().estimate(rows) == [1.0, -1.0, -1.0, 1.0, None]
    assert a.Return().estimate(rows) == [1.0, 0.0, -1.0, 0.3, None]
    assert a.One().estimate(rows) == [1.0] * 5


def outcome(rewards: list[float], final: float, values: list[float] | None = None) -> a.Outcome:
    return a.Outcome(0, final, len(rewards), token_rewards=rewards, values=values)


def test_token_rewards_add_to_the_final_one() -> None:
    row = outcome([-0.1, -0.2, -0.3], 1.0)
    assert row.total == pytest.approx(0.4)
    assert row.rewards() == pytest.approx([-0.1, -0.2, 0.7])
    assert a.GroupCentred().estimate([row, outcome([0.0], 0.0)]) == close([0.2, -0.2])


@given(rows=st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=5), min_size=1, max_size=5), discount=st.floats(0, 1))
def test_whitened_returns_have_mean_zero_and_variance_one(rows: list, discount: float) -> None:
    raw = [[sum(r * discount**k for k, r in enumerate(row[t:])) for t in range(len(row))] for row in rows]
    flat = [x for row in raw for x in row]
    mean, variance = statistics.fmean(flat), statistics.variance(flat) if len(flat) > 1 else 0.0
    expected = [[(x - mean) / (variance + 1e-8) ** 0.5 for x in row] for row in raw]
    ours = a.BatchWhitened(discount).estimate([outcome(row, 0.0) for row in rows])
    for found, theirs in zip(ours, expected, strict=True):
        assert found == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_generalised_advantages_by_hand() -> None:
    rewards, values, g, decay = [0.0, 0.0, 1.0], [0.2, 0.5, 0.7], 0.9, 0.8
    deltas = [0 + g * 0.5 - 0.2, 0 + g * 0.7 - 0.5, 1.0 - 0.7]
    x = g * decay
    expected = [deltas[0] + x * deltas[1] + x * x * deltas[2], deltas[1] + x * deltas[2], deltas[2]]
    assert a.generalised(rewards, values, g, decay) == close(expected)
    with pytest.raises(ValueError, match="critic"):
        a.GeneralisedAdvantage().estimate(group([1.0]))
