"""Several optimizer steps a batch in real Megatron ranks: against transformers in float64, and against steps made by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.packing import attention_parity, row_cost
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.batch.updates import order, split
from megatron_hpt.config import (
    AlgorithmConfig,
    ClipConfig,
    EntropyConfig,
    KlConfig,
    MismatchConfig,
    OptimizerConfig,
    TrainerConfig,
)
from megatron_hpt.models.hf_config import model_shape

from .test_actor import MAX_RESPONSE, STEPS, Layouts, Outcome, make_rows, token_logprobs

pytestmark = pytest.mark.slow
SEED = 5


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("updates"), tiny_model)


def several(updates: int = 2, epochs: int = 1, **algorithm) -> dict:
    trainer = TrainerConfig(steps=STEPS, seed=SEED, updates_per_batch=updates, epochs_per_batch=epochs)
    return {"trainer": trainer, "algorithm": AlgorithmConfig(**{"name": "hpt", **algorithm})}


def parts_of(model: Path, step: int, updates: int, epochs: int = 1) -> list[list[Row]]:
    """The trained rows of each optimizer step of a batch."""
    shape = model_shape(model)
    parity = attention_parity(shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim)
    rows = [row for row in make_rows(model, step) if row.weight]
    costs = [row_cost(len(row.tokens) - 1, parity) for row in rows]
    parts = split([row.group for row in rows], costs, [row.role for row in rows], updates)
    return [[rows[i] for i in parts[part]] for epoch in range(epochs) for part in order(updates, SEED, step, epoch)]


def by_hand(
    model: Path, steps: int, updates: int, epochs: int = 1, trainers_old: bool = False, tis: float | None = None
) -> Outcome:
    """The same training written out, in float64: HPT's loss, torch's AdamW, an optimizer step for every part."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def logprobs(row: Row) -> torch.Tensor:
        return token_logprobs(network, list(row.tokens))[0][row.prompt_length - 1 :]

    metrics = []
    for step in range(steps):
        parts, losses, norms = parts_of(model, step, updates, epochs), [], []
        with torch.no_grad():
            before = {row.prompt_id: logprobs(row) for part in parts for row in part}
        for rows in parts:
            rollouts = [row for row in rows if row.source is Source.ROLLOUT]
            share = len(rollouts) / len(rows)  # every row is a prompt of its own here
            demonstrated = sum(row.response_length for row in rows if row.source is Source.DEMONSTRATION)
            loss = torch.zeros((), dtype=torch.float64)
            for row in rows:
                if row.source is Source.DEMONSTRATION:
                    loss = loss - (1 - share) * logprobs(row).sum() / demonstrated
                    continue
                engine = torch.tensor(row.behaviour_logprobs, dtype=torch.float32).double()
                old = before[row.prompt_id] if trainers_old else engine
                weights = (old - engine).exp().clamp(max=tis) if tis else 1.0
                ratio = (logprobs(row) - old).exp()
                loss = loss - share * row.advantage * (weights * ratio).sum() / (len(rollouts) * MAX_RESPONSE)
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5).item())
            losses.append(loss.item())
            optimizer.step()
        metrics.append({"train/loss": sum(losses) / len(losses), "train/grad_norm": max(norms), "train/updates": len(parts)})
    return Outcome(metrics, {name: tensor.float() for name, tensor in network.state_dict().items()})


def assert_close(found: Outcome, expected: Outcome) -> None:
    for a, b in zip(found.metrics, expected.metrics, strict=True):
        assert {key: a[key] for key in b} == pytest.approx(b, rel=5e-5)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())


@pytest.fixture(scope="module")
def two_updates(layouts: Layouts) -> Outcome:
    return layouts.run("two", sections=several())


def test_two_updates_equal_two_steps_over_the_halves_in_float64(two_updates: Outcome, tiny_model: Path) -> None:
    assert_close(two_updates, by_hand(tiny_model, STEPS, updates=2))


def test_two_updates_are_two_steps_over_the_halves_bit_for_bit(layouts: Layouts) -> None:
    ledger = Ledger(layouts.folder / "halves")
    for step, rows in enumerate(parts_of(layouts.model, 0, updates=2)):
        ledger.write(Batch(step, rows))
    found = layouts.run("first of two", last=1, sections=several())
    assert_equal(found, layouts.run("halves made by hand", ledger="halves", last=2, sections=several(updates=1)))


def test_epochs_take_the_updates_again_in_other_orders(layouts: Layouts, tiny_model: Path) -> None:
    orders = {tuple(order(2, SEED, step, epoch)) for step in range(2) for epoch in range(3)}
    assert len(orders) == 2  # or the order would not be tested
    found = layouts.run("epochs", last=2, sections=several(updates=2, epochs=3))
    assert_close(found, by_hand(tiny_model, 2, updates=2, epochs=3))


DECOUPLED = {"old_policy": "trainer", "mismatch": MismatchConfig(correction="tis", high=1.1)}


def test_the_trainers_old_policy_with_a_bridge_to_the_engine_in_float64(layouts: Layouts, tiny_model: Path) -> None:
    """The batches after the first have log-probabilities of an engine that is another policy."""
    found = layouts.run("decoupled", sections=several(updates=2, epochs=2, **DECOUPLED))
    assert_close(found, by_hand(tiny_model, STEPS, updates=2, epochs=2, trainers_old=True, tis=1.1))


def test_with_one_update_the_trainers_old_policy_is_the_policy(layouts: Layouts) -> None:
    """A correction has always measured from there; without one the engine's rounding leaves the ratio."""
    tis = {"mismatch": MismatchConfig(correction="tis", high=1.1)}
    assert_equal(
        layouts.run("tis trainer", sections=several(updates=1, old_policy="trainer", **tis)),
        layouts.run("tis engine", sections=several(updates=1, **tis)),
    )


def test_clipping_acts_from_the_second_update_on(layouts: Layouts) -> None:
    narrow = {"name": "dr_grpo", "clip": ClipConfig(low=1e-4, high=1e-4), "old_policy": "trainer"}
    runs = [layouts.run(f"clip {n}", last=2, sections=several(updates=n, **narrow)) for n in (1, 2)]
    shares = [[step["train/masked_share"] for step in run.metrics] for run in runs]
    assert shares[0] == [0.0, 0.0]
    assert all(0.1 < share < 0.6 for share in shares[1])  # of the second update's tokens, those that have left it


def test_the_mismatch_is_that_of_the_weights_that_sampled(two_updates: Outcome, layouts: Layouts) -> None:
    assert two_updates.metrics[0]["mismatch/k3_kl"] < 1e-10  # transformers' own; the second update's would be above 1e-6
    plain = layouts.run("plain", last=1, sections=several(updates=1))
    for key in ("train/tokens", "train/rows"):
        assert two_updates.metrics[0][key] == plain.metrics[0][key]
    assert 0 < two_updates.metrics[0]["mismatch/tokens"] < plain.metrics[0]["mismatch/tokens"]


def test_a_run_that_was_killed_between_updates_ends_as_one_that_was_not(layouts: Layouts) -> None:
    """Whatever was done of a batch is gone with the process: the checkpoint before it has all that the batch depends on."""
    settings = several(updates=2, epochs=2, **DECOUPLED)
    whole = layouts.run("whole", sections=settings)
    saved = str(layouts.folder / "after two batches")
    layouts.run("before", "--save", saved, last=2, sections=settings)
    assert_equal(layouts.run("after", "--load", saved, first=2, sections=settings), whole)


LAYOUTS = {"2 stages x 2 data ranks": {"pipeline": 2, "data": 2}, "2 context ranks": {"context": 2}}
KEYS = ("train/loss", "train/entropy", "train/kl", "train/grad_norm", "train/masked_share", "mismatch/dropped_share")


@pytest.fixture(scope="module", params=["hpt", "reinforce_pp"])
def on_one_rank(request: pytest.FixtureRequest, layouts: Layouts) -> tuple[dict, Outcome]:
    """With a KL in the loss, and in the rewards, whose advantages are estimated over the whole batch."""
    kl = KlConfig(coefficient=0.05, place="loss" if request.param == "hpt" else "reward")
    settings = several(name=request.param, kl=kl, entropy=EntropyConfig(coefficient=0.01), **DECOUPLED)
    return settings, layouts.run(f"one rank {request.param}", last=2, sections=settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_do_not_depend_on_the_layout(layouts: Layouts, on_one_rank: tuple[dict, Outcome], layout: str) -> None:
    settings, one = on_one_rank
    other = layouts.run(f"{layout} {settings['algorithm'].name}", last=2, budget=40, sections=settings, **LAYOUTS[layout])
    for a, b in zip(other.metrics, one.metrics, strict=True):
        assert {key: a[key] for key in KEYS} == pytest.approx({key: b[key] for key in KEYS}, rel=5e-5, abs=1e-9)


def test_updates_that_are_not_taken_are_counted_one_by_one(layouts: Layouts) -> None:
    limit = {"optimizer": OptimizerConfig(skip_above=1e-6, stop_after_skipped=100)}
    (step,) = layouts.run("none", last=1, sections={**several(updates=3), **limit}).metrics
    assert (step["train/updates"], step["train/skipped"]) == (0, 3)
    assert step["train/skip_reason"].startswith("update 1 of 3: the gradient norm")


def test_a_batch_from_another_policy_trains_in_none_of_its_updates(layouts: Layouts) -> None:
    settings = several(updates=2, mismatch=MismatchConfig(stop_above=1e-4))
    first, disturbed = layouts.run("another policy", last=2, sections=settings).metrics
    assert (first["train/updates"], first["train/skipped"]) == (2, 0)  # its second update has drifted, and may
    assert (disturbed["train/updates"], disturbed["train/skipped"]) == (0, 2)
    assert disturbed["train/skip_reason"].startswith("update 1 of 2: mismatch/k3_kl")


def test_there_are_no_more_updates_than_prompts_that_train(layouts: Layouts) -> None:
    rows = Ledger(layouts.folder / "ledger").read(0).rows
    for name, some in (("few", rows[2:4]), ("none at all", [])):
        Ledger(layouts.folder / name).write(Batch(0, some))
    (step,) = layouts.run("few prompts", ledger="few", last=1, sections=several(updates=4)).metrics
    assert (step["train/updates"], step["train/skipped"]) == (2, 0)
    (step,) = layouts.run("no prompts", ledger="none at all", last=1, sections=several(updates=4)).metrics
    assert (step["train/updates"], step["train/skip_reason"]) == (0, "nothing to train")
