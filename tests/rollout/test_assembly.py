"""From graded groups to rows."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_hpt.batch.rows import Source
from megatron_hpt.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    GateConfig,
    ModelConfig,
    OverlongConfig,
    TrainerConfig,
)
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample
from megatron_hpt.objective import advantage as a
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.objective.gate import Choice
from megatron_hpt.rollout.assembly import Group, assemble, lag_metrics

LENGTH = 16


def group(name: str, rewards: list, demonstration: list | None = (8, 1), reward: float | None = None) -> Group:
    prompt = Prompt(name, [5, 6], list(demonstration) if demonstration else None, "7", "")
    samples = [Sample([7] * (i + 1), [-0.1] * (i + 1), "stop", ((3, i + 1),)) for i in range(len(rewards))]
    return Group(prompt, samples, rewards, reward)


def make(groups: list[Group], name: str = "hpt", prompts: int = 8, previous=None, overlong=None, **settings):
    config = Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t", max_response_length=LENGTH),
        algorithm=AlgorithmConfig(name=name, overlong=overlong or OverlongConfig(), **settings),
        trainer=TrainerConfig(prompts_per_step=prompts),
    )
    return assemble(3, groups, of_run(config), config, {"extra": 1}, previous)


def test_hpt_teaches_each_prompt_by_what_its_own_success_says() -> None:
    batch = make([group("solved", [1.0, 0.0]), group("failed", [0.0, 0.0]), group("unknown", [None, None])])
    rows = {(row.prompt_id, row.source): [] for row in batch.rows}
    for row in batch.rows:
        rows[row.prompt_id, row.source].append((row.weight, row.advantage))
    assert rows == {
        ("solved", Source.ROLLOUT): [(1.0, 0.5), (1.0, -0.5)],
        ("failed", Source.ROLLOUT): [(0.0, None), (0.0, None)],
        ("failed", Source.DEMONSTRATION): [(1.0, 1.0)],
        ("unknown", Source.ROLLOUT): [(0.0, None), (0.0, None)],
    }
    assert [(d["prompt_id"], d["solved"], d["choice"]) for d in batch.decisions] == [
        ("solved", 1, "rollouts"),
        ("failed", 0, "demonstration"),
        ("unknown", 0, "skipped"),
    ]
    assert batch.metrics["gate/sft_share"] == pytest.approx(1 / 3)
    assert batch.metrics["rollout/accuracy"] == 0.25
    assert batch.metrics["rollout/ungraded"] == 2
    assert batch.metrics["extra"] == 1


def test_an_ungraded_answer_is_never_a_zero() -> None:
    batch = make([group("p", [1.0, None, 1.0])])
    assert [(row.reward, row.advantage, row.weight) for row in batch.rows] == [
        (1.0, 0.0, 1.0),
        (None, None, 0.0),
        (1.0, 0.0, 1.0),
    ]
    assert batch.metrics["rollout/accuracy"] == 1.0


@pytest.mark.parametrize(("rule", "weight"), [("rollouts", 1.0), ("skip", 0.0)])
def test_a_prompt_without_demonstration_follows_the_rule_and_is_counted(rule: str, weight: float) -> None:
    batch = make([group("p", [0.0, 0.0], demonstration=None)], gate=GateConfig(missing_demonstration=rule))
    assert [row.weight for row in batch.rows] == [weight, weight]
    assert batch.metrics["gate/missing_demonstrations"] == 1


def test_a_row_holds_prompt_response_and_version() -> None:
    rollout, demonstration = make([group("p", [0.0])]).rows
    assert (rollout.tokens.tolist(), rollout.prompt_length, rollout.response_length) == ([5, 6, 7], 2, 1)
    assert (rollout.policy_version, rollout.behaviour_logprobs) == (3, np.float32([-0.1]))
    assert (demonstration.tokens.tolist(), demonstration.prompt_length) == ([5, 6, 8, 1], 2)
    assert (demonstration.behaviour_logprobs, demonstration.policy_version, demonstration.versions) == (None, None, None)


def test_a_row_of_several_versions_is_as_old_as_the_oldest() -> None:
    sample = Sample([7] * 5, [-0.1] * 5, "stop", ((3, 2), (4, 3)))
    (row,) = make([Group(group("p", []).prompt, [sample], [1.0])]).rows
    assert (row.policy_version, row.versions) == (3, ((3, 2), (4, 3)))


def test_sft_needs_no_rollouts() -> None:
    batch = make([Group(group("p", []).prompt)], name="sft")
    assert [row.source for row in batch.rows] == [Source.DEMONSTRATION]
    assert batch.metrics["rollout/accuracy"] is None


def test_the_band_trains_the_demonstration_off_policy() -> None:
    """What the reference intends and never reaches: the flag arrives at the row, with the demonstration's own reward."""
    gate = GateConfig(threshold=0, off_policy_threshold=1)
    batch = make([group("p", [1.0, 0.0, 0.0], reward=1.0)], gate=gate)
    (row,) = [row for row in batch.rows if row.weight]
    assert (row.source, row.off_policy, row.role.name, row.advantage) == (Source.DEMONSTRATION, True, "OFF_POLICY", 1.0)
    assert batch.metrics["gate/off_policy_share"] == 1.0


def test_luffy_compares_within_the_union() -> None:
    batch = make([group("p", [1.0, 0.0, 0.0], reward=1.0)], name="luffy")
    outcomes = [a.Outcome(0, reward, 1, demonstration=i == 3) for i, reward in enumerate([1.0, 0.0, 0.0, 1.0])]
    assert [row.advantage for row in batch.rows] == a.GroupStandardised(union=True).estimate(outcomes)
    assert batch.decisions[0]["choice"] == "both"


def test_a_soft_gate_weighs_rows() -> None:
    batch = make([group("p", [1.0, 0.0, 0.0, 0.0])], gate=GateConfig(soft=True))
    assert [row.weight for row in batch.rows] == [0.25] * 4 + [0.75]


def test_dynamic_sampling_trains_as_many_prompts_as_a_step_has() -> None:
    groups = [group(str(i), [1.0, float(i % 2)]) for i in range(8)]  # every other one is informative
    batch = make(groups, name="dapo", prompts=3)
    assert [d["choice"] for d in batch.decisions] == ["rollouts", "skipped"] * 3 + ["skipped"] * 2
    assert {row.prompt_id for row in batch.rows if row.weight} == {"0", "2", "4"}
    assert len(batch.rows) == 16  # all of them are recorded


@pytest.mark.parametrize(("length", "penalty"), [(12, 0.0), (13, 0.125), (14, 0.25), (16, 0.5)])
def test_overlong_responses_lose_reward_but_not_the_gates_favour(length: int, penalty: float) -> None:
    samples = [Sample([7] * length, [-0.1] * length, "stop", ((3, length),)), Sample([7], [-0.1], "stop", ((3, 1),))]
    batch = make([Group(group("p", []).prompt, samples, [1.0, 1.0])], overlong=OverlongConfig(buffer=4, penalty=0.5))
    assert batch.rows[0].reward == 1.0  # the record is the verifier's
    assert batch.rows[0].advantage == pytest.approx(-penalty / 2)
    assert batch.decisions[0]["solved"] == 2
    assert batch.metrics["overlong/penalty"] == pytest.approx(penalty / 2)


def test_truncated_responses_may_be_masked() -> None:
    samples = [Sample([7] * 16, [-0.1] * 16, "length", ((3, 16),)), Sample([7], [-0.1], "stop", ((3, 1),))]
    batch = make([Group(group("p", []).prompt, samples, [0.0, 1.0])], overlong=OverlongConfig(mask=True))
    assert [(row.weight, row.advantage) for row in batch.rows] == [(0.0, -0.5), (1.0, 0.5)]
    assert batch.metrics["overlong/masked"] == 1


def test_cancelled_samples_are_counted_and_what_they_saved_is_estimated() -> None:
    """Two cancelled when their prompt's longest had 2 tokens; the step's longer ones have 3 and 4."""
    cut = replace(group("cut", [0.0, 0.0]), cancelled=2)
    batch = make([cut, group("whole", [0.0, 1.0, 1.0, 1.0])], gate=GateConfig(threshold=2))
    assert [(d["choice"], d["solved"], d["graded"], d["cancelled"]) for d in batch.decisions] == [
        ("demonstration", 0, 2, 2),
        ("rollouts", 3, 4, 0),
    ]
    assert (batch.metrics["rollout/cancelled"], batch.metrics["rollout/saved_tokens"]) == (2, 2 * 1.5)
    assert batch.metrics["rollout/accuracy"] == 0.5  # of those that finished
    alone = make([cut], gate=GateConfig(threshold=2))
    assert alone.metrics["rollout/saved_tokens"] == 0.0  # nothing is known of longer ones


def test_hysteresis_remembers_the_last_decision() -> None:
    gate = GateConfig(threshold=0, hysteresis=1)
    groups = [group("p", [1.0, 0.0])]
    assert make(groups, gate=gate).decisions[0]["choice"] == "rollouts"
    again = make(groups, gate=gate, previous={"p": Choice.DEMONSTRATION})
    assert again.decisions[0]["choice"] == "demonstration"


def test_token_wise_advantages_are_kept_where_they_differ() -> None:
    batch = make([group("p", [1.0, 0.0])], name="reinforce_pp", discount=0.5)
    one_token, two_tokens = batch.rows
    assert one_token.advantage is not None
    assert two_tokens.advantage is not None  # a reward of 0 discounts to 0 everywhere
    batch = make([group("p", [0.0, 1.0])], name="reinforce_pp", discount=0.5)
    assert batch.rows[1].advantage is None
    assert len(batch.rows[1].token_advantages) == 2


@pytest.mark.parametrize(("name", "weight"), [("luffy", 0.0), ("off_on", 0.0), ("srft", 1.0)])
def test_an_ungraded_demonstration_is_counted_and_trains_only_what_needs_no_grade(name: str, weight: float) -> None:
    batch = make([group("p", [0.0, 0.0], reward=None)], name=name)
    (row,) = [row for row in batch.rows if row.source is Source.DEMONSTRATION]
    assert (row.weight, row.advantage) == (weight, None)
    assert batch.metrics["gate/ungraded_demonstrations"] == 1


def test_lags_are_counted_by_token() -> None:
    samples = [Sample([7] * 4, [-0.1] * 4, "stop", ((3, 1), (4, 3))), Sample([7] * 4, [-0.1] * 4, "length", ((5, 4),))]
    found = lag_metrics(5, [Group(Prompt("p", [5], None, "7", ""), samples, [1.0, 0.0])], 2)
    assert found == {
        "rollout/policy_version": 3,
        "rollout/lag": pytest.approx((1 * 2 + 3 * 1) / 8),
        "rollout/lag_max": 2,
        "rollout/lag_0_share": 0.5,
        "rollout/lag_1_share": 0.375,
        "rollout/lag_2_share": 0.125,
    }
    nothing = lag_metrics(5, [Group(Prompt("p", [5], None, "7", ""))], 0)
    assert nothing == {"rollout/policy_version": None, "rollout/lag": None, "rollout/lag_max": None}
