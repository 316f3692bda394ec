"""From graded groups to rows."""

import pytest

from megatron_hpt.config import AlgorithmConfig, GateConfig
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.data.rows import Source
from megatron_hpt.objective.algorithms import build
from megatron_hpt.rollout.assembly import Group, assemble
from megatron_hpt.rollout.engine import Sample


def group(name: str, rewards: list, demonstration: list | None = (8, 1)) -> Group:
    prompt = Prompt(name, [5, 6], list(demonstration) if demonstration else None, "7", "")
    samples = [Sample([7] * (i + 1), [-0.1] * (i + 1), "stop", 3) for i in range(len(rewards))]
    return Group(prompt, samples, rewards)


def make(groups: list[Group], **settings):
    return assemble(3, groups, build(AlgorithmConfig(name="hpt", **settings), 16), {"extra": 1})


def test_hpt_teaches_each_prompt_by_what_its_own_success_says() -> None:
    batch = make([group("solved", [1.0, 0.0]), group("failed", [0.0, 0.0]), group("unknown", [None, None])])
    rows = {(row.prompt_id, row.source): [] for row in batch.rows}
    for row in batch.rows:
        rows[row.prompt_id, row.source].append((row.weight, row.advantage))
    assert rows == {
        ("solved", Source.ROLLOUT): [(1.0, 0.5), (1.0, -0.5)],
        ("failed", Source.ROLLOUT): [(0.0, 0.0), (0.0, 0.0)],
        ("failed", Source.DEMONSTRATION): [(1.0, 1.0)],
        ("unknown", Source.ROLLOUT): [(0.0, None), (0.0, None)],
    }
    assert [d["choice"] for d in batch.decisions] == ["rollouts", "demonstration", "skipped"]
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
    assert (rollout.tokens, rollout.prompt_length, rollout.response_length) == ([5, 6, 7], 2, 1)
    assert (rollout.policy_version, rollout.behaviour_logprobs) == (3, [-0.1])
    assert (demonstration.tokens, demonstration.behaviour_logprobs, demonstration.policy_version) == ([5, 6, 8, 1], None, None)


def test_sft_needs_no_rollouts() -> None:
    groups = [Group(group("p", []).prompt)]
    batch = assemble(0, groups, build(AlgorithmConfig(name="sft"), 16), {})
    assert [row.source for row in batch.rows] == [Source.DEMONSTRATION]
    assert batch.metrics["rollout/accuracy"] is None
