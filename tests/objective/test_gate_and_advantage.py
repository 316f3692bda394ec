"""Gates, advantages and the table."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import AlgorithmConfig, GateConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.advantage import GroupCentred, GroupStandardised
from megatron_hpt.objective.algorithms import build
from megatron_hpt.objective.gate import AlwaysDemonstrations, AlwaysRollouts, Choice, Switch

REWARDS = st.lists(st.sampled_from([0.0, 1.0, None]), min_size=1, max_size=16)


@given(rewards=REWARDS, threshold=st.integers(0, 8))
def test_switch_teaches_by_demonstration_exactly_at_or_below_the_threshold(rewards: list, threshold: int) -> None:
    decision = Switch(threshold)("p", rewards, True)
    solved = rewards.count(1.0)
    if all(r is None for r in rewards):
        assert decision.choice is Choice.SKIPPED
    else:
        graded = len(rewards) - rewards.count(None)
        at_or_below = solved * len(rewards) <= threshold * graded  # 4 of 4 graded is not 4 of 8
        assert decision.choice is (Choice.DEMONSTRATION if at_or_below else Choice.ROLLOUTS)
    assert (decision.solved, decision.graded) == (solved, len(rewards) - rewards.count(None))


@pytest.mark.parametrize(("solved", "choice"), [(2, Choice.DEMONSTRATION), (3, Choice.ROLLOUTS)])
def test_a_threshold_below_one_is_a_share(solved: int, choice: Choice) -> None:
    assert Switch(0.25)("p", [1.0] * solved + [0.0] * (8 - solved), True).choice is choice


@pytest.mark.parametrize("rule", [Choice.ROLLOUTS, Choice.SKIPPED])
def test_a_missing_demonstration_follows_the_rule_and_is_counted(rule: Choice) -> None:
    decision = Switch(0, rule)("p", [0.0, 0.0], False)
    assert decision.choice is rule
    assert decision.missing_demonstration


def test_pure_gates() -> None:
    assert AlwaysRollouts()("p", [0.0], True).choice is Choice.ROLLOUTS
    assert AlwaysRollouts()("p", [None], True).choice is Choice.SKIPPED
    assert AlwaysDemonstrations()("p", [], True).choice is Choice.DEMONSTRATION
    assert AlwaysDemonstrations()("p", [], False).choice is Choice.SKIPPED


@given(rewards=REWARDS)
def test_ungraded_rollouts_neither_shift_nor_receive_an_advantage(rewards: list) -> None:
    graded = [r for r in rewards if r is not None]
    for estimator in (GroupCentred(), GroupStandardised()):
        advantages = estimator(rewards)
        assert [a is None for a in advantages] == [r is None for r in rewards]
        assert [a for a in advantages if a is not None] == estimator(graded)


@given(rewards=st.lists(st.floats(-3, 3), min_size=2, max_size=16))
def test_group_advantages_equal_their_definition(rewards: list) -> None:
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    assert GroupCentred()(rewards) == pytest.approx([r - mean for r in rewards])
    assert GroupStandardised()(rewards) == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards])


def test_a_group_of_one_teaches_nothing() -> None:
    assert GroupCentred()([1.0]) == [0.0]
    assert GroupStandardised()([1.0]) == [0.0]


def test_an_unknown_algorithm_is_refused_with_the_table() -> None:
    with pytest.raises(
        ConfigError, match=r"algorithm\.name: given 'hptt'; allowed: sft, grpo, dr_grpo, hpt; did you mean 'hpt'"
    ):
        build(AlgorithmConfig(name="hptt"), 8)


def test_the_recipe_sets_gate_and_coefficients() -> None:
    algorithm = build(AlgorithmConfig(name="hpt", gate=GateConfig(threshold=2), demonstration_coefficient=0.3), 8)
    assert algorithm.gate("p", [1.0, 1.0, 0.0], True).choice is Choice.DEMONSTRATION
    assert algorithm.demonstrations.coefficient == 0.3
