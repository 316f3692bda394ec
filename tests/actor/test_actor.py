"""The real actor against plain transformers and torch, and against itself in other layouts."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    DataConfig,
    EntropyConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_hpt.models.conversion import ToMegatron
from megatron_hpt.overrides import dump_yaml
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

STEPS, TEMPERATURE, MAX_RESPONSE = 3, 0.7, 20
WORKER = Path(__file__).with_name("worker.py")


@dataclass
class Outcome:
    metrics: list[dict]
    weights: dict[str, torch.Tensor]


class Layouts:
    """Runs the actor in a layout on the same saved batches."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        ledger = Ledger(folder / "ledger")
        for step in range(STEPS):
            ledger.write(Batch(step, make_rows(model, seed=step)))

    def run(
        self,
        name: str,
        *options: str,
        first: int = 0,
        last: int = STEPS,
        budget: int = 64,
        ledger: str = "ledger",
        sections: dict | None = None,
        **parallel: int,
    ) -> Outcome:
        """Run the actor.

        Args:
            sections: parts of the configuration in place of the usual ones.
        """
        out = self.folder / name
        out.mkdir()
        config = self.config(budget, **parallel).model_copy(update=sections or {})
        (out / "config.yaml").write_text(dump_yaml(config))
        arguments = [out / "config.yaml", self.folder / ledger, out, first, last, *options]
        run_ranks(WORKER, *arguments, ranks=config.parallel.ranks)
        metrics = json.loads((out / "metrics.json").read_text())
        return Outcome(metrics, load_file(out / "hf" / "model.safetensors"))

    def config(self, budget: int, **parallel: int) -> Config:
        return Config(
            name="parity",
            model=ModelConfig(path=str(self.model)),
            data=DataConfig(train="unused", max_prompt_length=8, max_response_length=MAX_RESPONSE),
            algorithm=AlgorithmConfig(name="hpt", entropy=EntropyConfig(coefficient=0.01), demonstration_coefficient=0.5),
            rollout=RolloutConfig(temperature=TEMPERATURE),
            parallel=ParallelConfig(**parallel),
            actor=ActorConfig(micro_batch_tokens=budget),
            optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.5),
            trainer=TrainerConfig(steps=STEPS),
        )


def make_rows(model: Path, seed: int) -> list[Row]:
    """Ragged rollouts and demonstrations; the engine's log-probabilities are those of transformers, plus noise."""
    rng, vocab = random.Random(seed), json.loads((model / "config.json").read_text())["vocab_size"]
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = []
    for index in range(12):
        prompt, response = rng.randint(1, 8), rng.randint(1, MAX_RESPONSE)
        # Not token 0: transformers' embedding drops the gradient of its padding token, Megatron has no such token.
        tokens = [rng.randrange(1, vocab) for _ in range(prompt + response)]
        if index % 3 == 0:
            rows.append(Row(str(index), index, Source.DEMONSTRATION, tokens, prompt, None, None, 1.0, 1.0, None))
            continue
        logprobs = [x + rng.uniform(-0.3, 0.3) * (seed > 0) for x in token_logprobs(network, tokens)[0][prompt - 1 :].tolist()]
        weight = 0.0 if index == 1 else 1.0
        rows.append(
            Row(str(index), index, Source.ROLLOUT, tokens, prompt, logprobs, 1.0, rng.uniform(-1, 1), weight, 0, "stop")
        )
    return rows


def token_logprobs(network: torch.nn.Module, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probability of every token but the first, and the entropies, by transformers and dense softmax."""
    ids = torch.tensor(tokens, dtype=torch.int64)[None]
    logp = (network(ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def reference_loss(network: torch.nn.Module, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch written out, and its mean entropy."""
    rows = [row for row in rows if row.weight]
    rollouts = [row for row in rows if row.source is Source.ROLLOUT]
    rollout_share = len(rollouts) / len(rows)  # every row is a prompt of its own here
    demonstration_tokens = sum(row.response_length for row in rows) - sum(row.response_length for row in rollouts)
    loss, entropy_sum = torch.zeros(()), torch.zeros(())
    for row in rows:
        logp, entropy = (x[row.prompt_length - 1 :] for x in token_logprobs(network, row.tokens))
        entropy_sum = entropy_sum + entropy.sum()
        if row.source is Source.ROLLOUT:
            ratio = (logp - torch.tensor(row.behaviour_logprobs)).exp()
            loss = loss - rollout_share * row.advantage * ratio.sum() / (len(rollouts) * MAX_RESPONSE)
        else:
            loss = loss - (1 - rollout_share) * 0.5 * logp.sum() / demonstration_tokens
    entropy = entropy_sum / sum(row.response_length for row in rows)
    return loss - 0.01 * entropy, entropy


def reference_training(model: Path) -> Outcome:
    """The same three steps with transformers, autograd and torch's AdamW."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    metrics = []
    for step in range(STEPS):
        total, entropy = reference_loss(network, make_rows(model, step))
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        metrics.append({"train/loss": total.item(), "train/entropy": entropy.item(), "train/grad_norm": norm.item()})
    return Outcome(metrics, dict(network.state_dict()))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("layouts"), tiny_model)


@pytest.fixture(scope="module")
def one_rank(layouts: Layouts) -> Outcome:
    return layouts.run("one", last=STEPS)


def assert_same(found: Outcome, expected: Outcome, rtol: float = 2e-5) -> None:
    for step, (a, b) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        for key in ("train/loss", "train/entropy", "train/grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=rtol), (step, key)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_one_rank_equals_transformers_and_torch(one_rank: Outcome, tiny_model: Path) -> None:
    assert_same(one_rank, reference_training(tiny_model))
    assert one_rank.metrics[0]["mismatch/k3_kl"] < 1e-10  # the first batch carries transformers' own log-probabilities
    assert one_rank.metrics[0]["mismatch/logprob_gap"] < 1e-5
    assert one_rank.metrics[1]["mismatch/k3_kl"] > 1e-3  # the others were disturbed


def test_overrides_compute_what_an_edited_folder_computes(tmp_path: Path, tiny_model: Path) -> None:
    """`model.overrides` against transformers on a copy whose config.json was edited by hand, as the seed does it."""
    edited = tmp_path / "edited"
    shutil.copytree(tiny_model, edited)
    config = json.loads((edited / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 40.0
    (edited / "config.json").write_text(json.dumps(config))
    layouts = Layouts(tmp_path, edited)  # whose batches have the log-probabilities of the edited folder
    overridden = ModelConfig(path=str(tiny_model), overrides={"rope_theta": 40.0})
    first = {
        name: layouts.run(name, "--gradients", last=1, sections={"model": model}, tensor=2)
        for name, model in (("overridden", overridden), ("original", ModelConfig(path=str(tiny_model))))
    }
    gaps = {name: run.metrics[0]["logprob_gap"] / run.metrics[0]["measured"] for name, run in first.items()}
    assert gaps["overridden"] < 1e-6
    assert gaps["original"] > 100 * gaps["overridden"]


@pytest.mark.parametrize(
    ("name", "parallel"),
    [("tp2", {"tensor": 2}), ("pp2", {"pipeline": 2}), ("dp2", {"data": 2})],
)
def test_two_ranks_give_the_same_curve(layouts: Layouts, one_rank: Outcome, name: str, parallel: dict) -> None:
    assert_same(layouts.run(name, budget=40, **parallel), one_rank)


def test_training_starts_from_a_checkpoint_as_from_the_folder(layouts: Layouts) -> None:
    """Converted for one layout, trained in another; bit for bit."""
    converted = layouts.folder / "converted"
    ToMegatron(layouts.model, ParallelConfig(pipeline=2), None).write(converted)
    start = {"model": ModelConfig(path=str(converted))}
    found, expected = layouts.run("from_checkpoint", sections=start, tensor=2), layouts.run("from_folder", tensor=2)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
    assert [step["train/loss"] for step in found.metrics] == [step["train/loss"] for step in expected.metrics]


def test_micro_batches_do_not_change_the_curve(layouts: Layouts, one_rank: Outcome) -> None:
    assert_same(layouts.run("large", budget=10_000), one_rank)
    assert_same(layouts.run("small", budget=1), one_rank)


def test_resume_is_exact_and_a_checkpoint_loads_into_another_layout(layouts: Layouts, one_rank: Outcome) -> None:
    saved = str(layouts.folder / "half")
    layouts.run("before", "--save", saved, last=2)
    resumed = layouts.run("after", "--load", saved, first=2)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in one_rank.weights.items())
    elsewhere = layouts.run("elsewhere", "--load", saved, first=2, tensor=2)
    assert_same(elsewhere, Outcome(one_rank.metrics[2:], one_rank.weights))
