"""The objective inside real Megatron ranks: invariance of loss and gradient, every kind of batch, KL, skipped steps."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hpt.actor.updates import PROBE_ROWS, selected_rows
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.config import AlgorithmConfig, EntropyConfig, KlConfig, MismatchConfig, OptimizerConfig

from .test_actor import Layouts, Outcome, make_rows

pytestmark = pytest.mark.slow

AROUND = {"entropy": EntropyConfig(coefficient=0.01), "kl": KlConfig(coefficient=0.05)}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("objective"), tiny_model)


def algorithm(name: str, **settings) -> dict:
    return {"algorithm": AlgorithmConfig(name=name, **{**AROUND, **settings})}


@pytest.fixture(scope="module")
def gradient(layouts: Layouts) -> Outcome:
    """Loss and gradient of one batch, by one rank in one micro-batch."""
    return layouts.run("whole", "--gradients", budget=10_000, sections=algorithm("hpt"))


CUTS = {
    "many micro-batches": {"budget": 30},
    "one row each": {"budget": 1},
    "2 data ranks": {"budget": 40, "data": 2},
    "4 data ranks": {"data": 4},
    "2 tensor ranks": {"tensor": 2},
    "4 tensor ranks, 2 groups": {"tensor": 4},
    "2 stages": {"budget": 40, "pipeline": 2},
    "2 tensor ranks x 2 data ranks": {"budget": 40, "tensor": 2, "data": 2},
}


def assert_same_gradient(found: Outcome, expected: Outcome, tolerance: float = 1e-6) -> None:
    for key in ("loss", "loss_rollouts", "loss_demonstrations", "entropy", "kl"):
        assert found.metrics[0][key] == pytest.approx(expected.metrics[0][key], rel=tolerance), key
    difference = sum((found.weights[name] - tensor).double().square().sum() for name, tensor in expected.weights.items())
    norm = sum(tensor.double().square().sum() for tensor in expected.weights.values())
    assert norm > 0
    assert (difference / norm).sqrt() < tolerance


@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_do_not_depend_on_the_cut(layouts: Layouts, gradient: Outcome, cut: str) -> None:
    assert_same_gradient(layouts.run(cut, "--gradients", sections=algorithm("hpt"), **CUTS[cut]), gradient)


def test_loss_and_gradient_do_not_depend_on_order_or_padding(layouts: Layouts, gradient: Outcome) -> None:
    """Untrained rows are padding to the loss: they are in the packed batch and must add nothing."""
    rows = Ledger(layouts.folder / "ledger").read(0).rows
    padding = [replace(row, weight=0.0, advantage=None) for row in rows if row.source is Source.ROLLOUT][:3]
    Ledger(layouts.folder / "shuffled").write(Batch(0, [*padding, *rows[::-1]]))
    found = layouts.run("shuffled_padded", "--gradients", ledger="shuffled", sections=algorithm("hpt"), data=2)
    assert_same_gradient(found, gradient)


SPECIAL: dict[str, dict] = {
    "hpt with a KL in the reward": algorithm("hpt", kl=KlConfig(coefficient=0.05, estimator="k1", place="reward")),
    "luffy": algorithm("luffy"),
    "srft": algorithm("srft"),
    "gspo with icepop": algorithm("gspo", mismatch=MismatchConfig(correction="icepop", low=0.8, high=1.25)),
    "reinforce_pp with a KL in the reward": algorithm("reinforce_pp", kl=KlConfig(coefficient=0.05, place="reward")),
    "adaptive entropy": algorithm("hpt", entropy=EntropyConfig(coefficient=0.1, target=1.0, rate=0.5)),
}
RATIO_KEYS = (
    "train/loss",
    "train/entropy",
    "train/grad_norm",
    "train/kl",
    "train/entropy_coefficient",
    "mismatch/dropped_share",
)


@pytest.mark.parametrize("name", SPECIAL)
def test_algorithms_and_what_is_around_them_agree_over_layouts(layouts: Layouts, name: str) -> None:
    one = layouts.run(f"{name} 1", last=2, sections=SPECIAL[name])
    other = layouts.run(f"{name} 2", last=2, budget=40, sections=SPECIAL[name], pipeline=2, data=2)
    for a, b in zip(other.metrics, one.metrics, strict=True):
        assert not b["train/skipped"]
        for key in RATIO_KEYS:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=1e-9), key
    assert one.metrics[1]["train/kl"] != 0  # the actor has moved, the reference has not; k1 has either sign
    if name == "adaptive entropy":
        before, after = one.metrics
        moved = before["train/entropy_coefficient"] * math.exp(0.5 * (1.0 - before["train/entropy"]))
        assert after["train/entropy_coefficient"] == pytest.approx(moved)


def test_a_kl_in_the_reward_is_estimated_again(layouts: Layouts) -> None:
    """By hand: the reward of each rollout less β · k1 of the sampling policy, then centred within its group."""
    rows = [replace(row, group=0) for row in make_rows(layouts.model, seed=1) if row.source is Source.ROLLOUT and row.weight]
    rows = [replace(row, reward=float(index % 2)) for index, row in enumerate(rows)]
    Ledger(layouts.folder / "grouped").write(Batch(0, rows))
    reward = KlConfig(coefficient=0.3, estimator="k1", place="reward")
    found = layouts.run("kl_reward", ledger="grouped", last=1, sections=algorithm("hpt", kl=reward))
    # One step from the start: the reference is the actor, and transformers' log-probabilities are both's.
    from .test_actor import AutoModelForCausalLM, token_logprobs

    network = AutoModelForCausalLM.from_pretrained(layouts.model, dtype=torch.float32)
    logps = [token_logprobs(network, row.tokens)[0][row.prompt_length - 1 :].tolist() for row in rows]
    penalised = [
        row.reward - 0.3 * sum(b - x for b, x in zip(row.behaviour_logprobs.tolist(), logp, strict=True))
        for row, logp in zip(rows, logps, strict=True)
    ]
    mean = sum(penalised) / len(penalised)
    ratios = [
        sum(math.exp(x - b) for b, x in zip(row.behaviour_logprobs.tolist(), logp, strict=True))
        for row, logp in zip(rows, logps, strict=True)
    ]
    expected = -sum((r - mean) * ratio for r, ratio in zip(penalised, ratios, strict=True)) / (len(rows) * 20)
    assert found.metrics[0]["train/loss_rollouts"] == pytest.approx(expected, rel=1e-4)


def of_kind(rows: list[Row], source: Source) -> list[Row]:
    return [row for row in rows if row.source is source]


KINDS = {
    "all demonstrations": lambda rows: of_kind(rows, Source.DEMONSTRATION),
    "all rollouts": lambda rows: of_kind(rows, Source.ROLLOUT),
    "one row, so one rank has none": lambda rows: rows[2:3],
    "nothing trained": lambda rows: [replace(row, weight=0.0) for row in rows],
    "no row at all": lambda rows: [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_batch_neither_hangs_nor_gives_a_nan(layouts: Layouts, kind: str) -> None:
    ledger = Ledger(layouts.folder / kind)
    ledger.write(Batch(0, KINDS[kind](Ledger(layouts.folder / "ledger").read(0).rows)))
    saved = str(layouts.folder / f"checkpoint {kind}")  # also where the optimizer has not stepped yet
    found = layouts.run(f"run {kind}", "--save", saved, ledger=kind, last=1, sections=algorithm("hpt"), data=2)
    (metrics,) = found.metrics
    assert all(math.isfinite(v) for v in metrics.values() if isinstance(v, float))
    empty = kind in ("nothing trained", "no row at all")
    assert metrics["train/skip_reason"] == ("nothing to train" if empty else None)
    assert (metrics["train/grad_norm"] == 0.0) is empty  # inert fillers and untrained rows: exactly zero


def test_a_step_that_would_damage_the_policy_is_not_taken(layouts: Layouts) -> None:
    """Infinite gradients, a norm above the limit, an engine that disagrees: skipped; the run can go on."""
    good = Ledger(layouts.folder / "ledger").read(0).rows
    broken = [
        replace(row, behaviour_logprobs=[-200.0] * row.response_length) if row.source is Source.ROLLOUT else row for row in good
    ]
    ledger = Ledger(layouts.folder / "broken")
    for step, rows in enumerate([broken, good]):
        ledger.write(Batch(step, rows))
    found = layouts.run("skip_inf", ledger="broken", last=2, sections=algorithm("hpt", kl=KlConfig()))
    assert [m["train/skipped"] for m in found.metrics] == [1, 0]
    assert "the gradient norm is" in found.metrics[0]["train/skip_reason"]
    plain = layouts.run("skip_none", last=1, sections=algorithm("hpt", kl=KlConfig()))
    key = "train/loss"
    assert found.metrics[1][key] == pytest.approx(plain.metrics[0][key], rel=1e-6)  # the weights are as before

    limit = {"optimizer": OptimizerConfig(skip_above=1e-6)}
    found = layouts.run("skip_norm", last=2, sections={**algorithm("hpt"), **limit}, data=2)
    assert [m["train/skipped"] for m in found.metrics] == [1, 1]
    assert "above optimizer.skip_above=1e-06" in found.metrics[0]["train/skip_reason"]
    start = layouts.run("untouched", "--gradients", sections=algorithm("hpt"))
    assert found.weights.keys() == start.weights.keys()

    switch = MismatchConfig(stop_above=1e-4)
    found = layouts.run("skip_mismatch", last=2, sections=algorithm("hpt", mismatch=switch))
    assert [m["train/skipped"] for m in found.metrics] == [0, 1]  # the second batch's log-probabilities were disturbed
    assert "above algorithm.mismatch.stop_above" in found.metrics[1]["train/skip_reason"]

    # A broken engine solves nothing, so nothing trains: the switch must see it all the same.
    untrained = [replace(row, weight=0.0) for row in Ledger(layouts.folder / "ledger").read(1).rows]
    Ledger(layouts.folder / "unsolved").write(Batch(0, untrained))
    found = layouts.run("skip_unsolved", ledger="unsolved", last=1, sections=algorithm("hpt", mismatch=switch))
    assert "above algorithm.mismatch.stop_above" in found.metrics[0]["train/skip_reason"]


def test_rollouts_that_do_not_train_are_measured_too() -> None:
    row = Row("p", 0, Source.ROLLOUT, [5, 6, 7], 1, [-0.5, -0.25], 0.0, -0.5, 0.0, 3, "length")  # masked: hit the limit
    assert len(selected_rows([row] * 20)) == PROBE_ROWS
    assert len(selected_rows([row] * 20, in_reward=True)) == 20  # others are compared with them
    assert len(selected_rows([replace(row, weight=1.0)] * 20 + [row])) == 20
