"""Gates: every rule against its definition."""

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.config import AlgorithmConfig, GateConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.algorithms import build
from megatron_hpt.objective.gate import (
    AlwaysDemonstrations,
    AlwaysRollouts,
    Choice,
    Decision,
    Informative,
    Mixture,
    Phases,
    Situation,
    Switch,
    Thresholds,
    Union,
    decides_early,
)
from megatron_hpt.objective.gates import hybrid, schedule

NAMES = ("hpt", "sft", "grpo", "dapo", "luffy", "chord", "sft_grpo")
REWARDS = st.lists(st.sampled_from([0.0, 1.0, None]), min_size=1, max_size=16)


def solved(number: int, n: int = 8, **known) -> Situation:
    return Situation("p", [1.0] * number + [0.0] * (n - number), **{"has_demonstration": True, **known})


def choices(config: GateConfig, n: int = 8, **known) -> str:
    """One letter for each count of solved answers: d(emonstration), o(ff-policy), r(ollouts), b(oth), s(kipped)."""
    gate = hybrid(config)
    return "".join(gate(solved(k, n, **known)).choice[0] for k in range(n + 1))


@given(rewards=REWARDS, threshold=st.integers(-1, 8), strict=st.booleans())
def test_switch_teaches_by_demonstration_exactly_at_or_below_the_threshold(rewards: list, threshold: int, strict: bool) -> None:
    decision = Switch(Thresholds(threshold, strict=strict))(Situation("p", rewards, True))
    right, graded = rewards.count(1.0), len(rewards) - rewards.count(None)
    if not graded:
        assert decision.choice is Choice.SKIPPED
    else:
        share, limit = Fraction(right, graded), Fraction(threshold, len(rewards))  # 4 of 4 graded is not 4 of 8
        taught = share < limit if strict else share <= limit
        assert decision.choice is (Choice.DEMONSTRATION if taught else Choice.ROLLOUTS)
    assert (decision.solved, decision.graded) == (right, graded)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GateConfig(threshold=2), "dddrrrrrr"),
        (GateConfig(threshold=0.25), "dddrrrrrr"),
        (GateConfig(threshold=0.25, strict=True), "ddrrrrrrr"),
        (GateConfig(threshold=-1), "rrrrrrrrr"),  # pure RL
        (GateConfig(threshold=8), "ddddddddd"),  # pure SFT with the prompts of RL
        (GateConfig(threshold=1.0), "ddddddddd"),
        (GateConfig(threshold=0, off_policy_threshold=3), "dooorrrrr"),
        (GateConfig(threshold=0, off_policy_threshold=0.5, strict=True), "oooorrrrr"),
    ],
)
def test_thresholds(config: GateConfig, expected: str) -> None:
    assert choices(config) == expected


@pytest.mark.parametrize("tenths", range(11))
def test_a_decimal_share_is_what_it_says(tenths: int) -> None:
    """7 of 10 is not below 0.7, whatever the nearest binary number is."""
    assert choices(GateConfig(threshold=tenths / 10), n=10) == "d" * (tenths + 1) + "r" * (10 - tenths)
    assert choices(GateConfig(threshold=tenths / 10, strict=True), n=10) == "d" * tenths + "r" * (11 - tenths)


def test_hysteresis_holds_a_prompt_that_was_taught() -> None:
    config = GateConfig(threshold=1, hysteresis=2)
    assert choices(config) == "ddrrrrrrr"
    assert choices(config, previous=Choice.ROLLOUTS) == "ddrrrrrrr"
    assert choices(config, previous=Choice.DEMONSTRATION) == "ddddrrrrr"
    assert choices(GateConfig(threshold=0.25, hysteresis=0.25), previous=Choice.DEMONSTRATION) == "dddddrrrr"


def test_hysteresis_moves_no_prompt_to_a_side_that_it_never_was_on() -> None:
    config = GateConfig(threshold=0, off_policy_threshold=4, hysteresis=1)
    assert choices(config, previous=Choice.OFF_POLICY) == "dooooorrr"  # the band is wider, the demonstration's side is not
    assert choices(config, previous=Choice.DEMONSTRATION) == "ddoooorrr"
    never = GateConfig(threshold=-1, off_policy_threshold=0, hysteresis=1)
    assert choices(never, previous=Choice.OFF_POLICY) == "oorrrrrrr"


COUNTS, SHARES = st.integers(-1, 8), st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.5, 0.7, 1.0])


@st.composite
def switches(draw: st.DrawFn) -> Switch:
    def thresholds() -> Thresholds:
        kind = draw(st.sampled_from([COUNTS, SHARES]))
        low, *high = sorted(draw(st.lists(kind, min_size=1, max_size=2)))
        return Thresholds(low, high[0] if high else None, strict=draw(st.booleans()))

    without = draw(st.sampled_from([Choice.ROLLOUTS, Choice.SKIPPED]))
    by_source = {"hard": thresholds()} if draw(st.booleans()) else {}
    return Switch(thresholds(), without, by_source, draw(st.integers(0, 3) | SHARES))


@given(
    gate=switches(),
    rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=8),
    missing=st.integers(1, 5),
    previous=st.sampled_from([None, *Choice]),
    source=st.sampled_from(["", "hard"]),
    has=st.booleans(),
)
@settings(max_examples=600)
def test_what_is_decided_early_is_decided_so_whatever_comes(gate, rewards, missing, previous, source, has) -> None:
    """Over every completion, ungraded ones included: the decision that was made without them; and exactly then."""
    so_far = Situation("p", rewards, has, data_source=source, previous=previous)
    wanted = len(rewards) + missing
    early = gate(replace(so_far, cancelled=missing))
    endings = {
        tuple(sorted(more, key=str)): gate(replace(so_far, rewards=[*rewards, *more]))
        for more in itertools.combinations_with_replacement([0.0, 1.0, None], missing)
    }
    same = [ending.outcome == early.outcome and not ending.rollout_weight for ending in endings.values()]
    assert gate.decided(so_far, wanted) == all(same)
    assert early.cancelled == missing
    if gate.decided(so_far, wanted):
        assert decides_early(gate, replace(so_far, rewards=[]), wanted)
        assert gate.decided(replace(so_far, rewards=[*rewards, 0.0]), wanted)  # and stays so
        assert gate.decided(replace(so_far, rewards=[*rewards, 1.0]), wanted)


@pytest.mark.parametrize(
    ("config", "rewards", "decided"),
    [
        (GateConfig(threshold=4), [0.0] * 3, False),
        (GateConfig(threshold=4), [0.0] * 4, True),  # at most 4 of 8 can be solved
        (GateConfig(threshold=4, strict=True), [0.0] * 4, False),
        (GateConfig(threshold=0.5), [0.0, 1.0, 0.0, 0.0, 0.0], True),
        (GateConfig(threshold=4), [1.0] * 5, False),  # RL needs its rollouts
        (GateConfig(threshold=0), [0.0] * 7, False),
        (GateConfig(threshold=1, off_policy_threshold=5), [0.0] * 3, False),
        (GateConfig(threshold=1, off_policy_threshold=5), [0.0] * 3 + [1.0] * 2, True),  # the band, whatever comes
        (GateConfig(threshold=8), [], False),  # nothing known is a skipped prompt
        (GateConfig(threshold=8), [0.0], True),
        (GateConfig(soft=True), [0.0] * 7, False),
    ],
)
def test_when_a_decision_is_fixed(config: GateConfig, rewards: list, decided: bool) -> None:
    assert hybrid(config).decided(Situation("p", rewards, True), 8) is decided


def test_only_gates_that_can_are_asked_sample_by_sample() -> None:
    early = {
        name: decides_early(build(AlgorithmConfig(name=name, sft_steps=1), 8).gate, Situation("p", [], True), 8)
        for name in NAMES
    }
    assert early == dict.fromkeys(NAMES, False)  # with the threshold 0 of the default all rollouts are needed
    assert decides_early(hybrid(GateConfig(threshold=1)), Situation("p", [], True), 8)
    assert not decides_early(hybrid(GateConfig(threshold=1)), Situation("p", [], False), 8)
    phases = Phases(AlwaysDemonstrations(), hybrid(GateConfig(threshold=1)), 2)
    assert [decides_early(phases, Situation("p", [], True, step=step), 8) for step in (1, 2)] == [False, True]


def test_a_data_source_has_its_own_thresholds() -> None:
    config = GateConfig(threshold=0, by_source={"olympiad": {"threshold": 3, "off_policy_threshold": 5}})
    assert choices(config) == "drrrrrrrr"
    assert choices(config, data_source="olympiad") == "ddddoorrr"


def test_soft_gates_weigh_both_losses_of_one_prompt() -> None:
    gate = hybrid(GateConfig(soft=True))
    found = [gate(solved(k, 4)) for k in range(5)]
    assert [(d.rollout_weight, d.demonstration_weight) for d in found] == [
        (0, 1),
        (0.25, 0.75),
        (0.5, 0.5),
        (0.75, 0.25),
        (1, 0),
    ]
    assert "".join(d.choice[0] for d in found) == "dbbbr"


def test_a_table_is_linear_between_its_factors() -> None:
    table = schedule([0, 0, 1, 1, 2], "f", rising=True)
    assert [table(k / 4) for k in range(5)] == [0, 0, 1, 1, 2]
    assert table(0.375) == 0.5


@pytest.mark.parametrize(
    ("given", "rising", "message"),
    [
        ("down", True, "f: 'down' must not fall with the share solved"),
        ([0, 1, 0.5], True, r"must not fall"),
        ([0.5, 1], False, r"must not rise"),
        ("sideways", True, "f: given 'sideways'; allowed: up, down, a list of factors, or module:function"),
        ("no_such_module:f", True, "f: 'no_such_module:f' cannot be imported"),
        ([1.0], True, "needs at least two factors"),
        ("math:cos", True, "must not fall"),
        ("math:pi", True, "not a function"),
    ],
)
def test_a_schedule_that_is_none_is_refused(given, rising: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schedule(given, "f", rising)


def test_a_function_by_import_path_is_a_schedule() -> None:
    assert schedule("math:sqrt", "f", rising=True)(0.25) == 0.5


def test_an_empty_band_is_refused() -> None:
    with pytest.raises(ConfigError, match="given 1, below the threshold 2"):
        hybrid(GateConfig(threshold=2, off_policy_threshold=1))


@pytest.mark.parametrize(("value", "message"), [(2.5, "fraction from 0.0 to 1.0"), (-2, "count of the rollouts")])
def test_a_threshold_is_a_count_or_a_share(value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(threshold=value)


@pytest.mark.parametrize("rule", ["rollouts", "skip"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_missing_demonstration_follows_the_rule_and_is_counted(rule: str, soft: bool) -> None:
    decision = hybrid(GateConfig(threshold=1, missing_demonstration=rule, soft=soft))(solved(1, has_demonstration=False))
    assert decision.choice == {"rollouts": "rollouts", "skip": "skipped"}[rule]
    assert decision.missing_demonstration


def test_a_missing_demonstration_leaves_rollouts_the_weight_they_have() -> None:
    soft = hybrid(GateConfig(soft=True))(solved(2, has_demonstration=False))
    assert (soft.rollout_weight, soft.demonstration_weight, soft.missing_demonstration) == (0.25, 0.0, True)
    mixed = Mixture(0.9, 0.1, 4)(solved(2, has_demonstration=False))
    assert mixed.rollout_weight == pytest.approx(0.1)
    assert Union(Choice.SKIPPED)(solved(2, has_demonstration=False)).choice is Choice.SKIPPED


def test_pure_gates() -> None:
    assert AlwaysRollouts()(solved(0)).choice is Choice.ROLLOUTS
    assert AlwaysRollouts()(Situation("p", [None], True)).choice is Choice.SKIPPED
    assert AlwaysDemonstrations()(Situation("p", [], True)).choice is Choice.DEMONSTRATION
    assert AlwaysDemonstrations()(Situation("p", [], False)).choice is Choice.SKIPPED
    assert AlwaysDemonstrations().samples(8, True, 0) == 0


def test_dynamic_sampling_keeps_what_teaches() -> None:
    assert "".join(Informative()(solved(k, 4)).choice[0] for k in range(5)) == "srrrs"
    assert Informative().refills


def test_the_union_makes_room_for_the_demonstration() -> None:
    gate = Union()
    assert (gate.samples(8, True, 0), gate.samples(8, False, 0)) == (7, 8)
    both = gate(solved(0))
    assert (both.choice, both.rollout_weight, both.demonstration_weight) == (Choice.BOTH, 1.0, 1.0)
    assert gate(Situation("p", [None], True)).choice is Choice.DEMONSTRATION
    assert gate(solved(1, has_demonstration=False)).choice is Choice.ROLLOUTS


def test_a_global_mixture_moves_by_step() -> None:
    gate = Mixture(0.9, 0.1, 4)
    found = [gate(solved(1, step=step)) for step in (0, 2, 4, 9)]
    assert [d.demonstration_weight for d in found] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert [d.rollout_weight for d in found] == pytest.approx([0.1, 0.5, 0.9, 0.9])


def test_phases_hand_over_at_a_step() -> None:
    gate = Phases(AlwaysDemonstrations(), AlwaysRollouts(), 2)
    assert [gate(solved(0, step=step)).choice for step in (0, 1, 2)] == ["demonstration", "demonstration", "rollouts"]
    assert [gate.samples(8, True, step) for step in (1, 2)] == [0, 8]


@pytest.mark.parametrize("name", NAMES)
def test_a_decision_is_whole(name: str) -> None:
    algorithm = build(AlgorithmConfig(name=name, sft_steps=1), 8)
    decision = algorithm.gate(solved(1, data_source="s"))
    assert isinstance(decision, Decision)
    assert (decision.prompt_id, decision.data_source, decision.has_demonstration) == ("p", "s", True)
    assert (decision.choice is Choice.SKIPPED) == (decision.rollout_weight == decision.demonstration_weight == 0)
