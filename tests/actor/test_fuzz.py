"""Batches of any number of rows and any lengths, on up to four ranks: no hang, and one rank's gradient."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.examples import tiny_llama
from megatron_hpt.overrides import dump_yaml
from tests.ranks import run_ranks

from .test_actor import WORKER, Layouts

pytestmark = pytest.mark.slow
BATCHES = 14
NUMBERS = (0, 1, 2, 3, 64)
"""Rows of the first batches; the others' are random."""
LAYOUTS: dict[str, dict] = {
    "DP4": {"data": 4},
    "TP2 x CP2, SP": {"tensor": 2, "context": 2, "sequence": True},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
    "PP2 x CP2, VPP2": {"pipeline": 2, "context": 2, "virtual_pipeline": 2},
}


def random_rows(rng: random.Random, number: int, vocab: int) -> list[Row]:
    rows = []
    for index in range(number):
        prompt, response = rng.choice([1, 2, rng.randint(1, 8)]), rng.choice([1, 2, rng.randint(1, 20)])
        tokens = [rng.randrange(1, vocab) for _ in range(prompt + response)]
        if rng.random() < 0.4:
            rows.append(Row(str(index), index, Source.DEMONSTRATION, tokens, prompt, None, None, 1.0, 1.0, None))
            continue
        logprobs = [-4.7 + rng.uniform(-0.3, 0.3) for _ in range(response)]
        weight = float(rng.random() < 0.8)
        rows.append(
            Row(str(index), index, Source.ROLLOUT, tokens, prompt, logprobs, 1.0, rng.uniform(-1, 1), weight, 0, "stop")
        )
    return rows


class Fuzz(Layouts):
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        rng, ledger = random.Random(0), Ledger(folder / "ledger")
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        for step in range(BATCHES):
            number = NUMBERS[step] if step < len(NUMBERS) else rng.randint(0, 64)
            ledger.write(Batch(step, random_rows(rng, number, vocab)))

    def gradients(self, name: str, **parallel) -> list[tuple[dict, dict[str, torch.Tensor]]]:
        out = self.folder / name.replace(" ", "_")
        out.mkdir()
        config = self.config(random.Random(name).choice([30, 64, 200]), **parallel)
        (out / "config.yaml").write_text(dump_yaml(config))
        arguments = [out / "config.yaml", self.folder / "ledger", out, 0, BATCHES, "--each"]
        run_ranks(WORKER, *arguments, ranks=config.parallel.ranks)
        sums = json.loads((out / "metrics.json").read_text())
        return [(sums[step], load_file(out / f"batch_{step}" / "model.safetensors")) for step in range(BATCHES)]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Fuzz:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_llama.write(folder / "model", hidden=64, layers=4, heads=4, kv_heads=2, positions=64)
    return Fuzz(folder, folder / "model")


@pytest.fixture(scope="module")
def one_rank(fuzz: Fuzz) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    return fuzz.gradients("one")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_batch_gives_one_ranks_gradient(fuzz: Fuzz, one_rank: list, layout: str) -> None:
    for (sums, found), (expected_sums, expected) in zip(fuzz.gradients(layout, **LAYOUTS[layout]), one_rank, strict=True):
        assert sums["loss"] == pytest.approx(expected_sums["loss"], rel=1e-5, abs=1e-7)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.norm()) + 1e-12)
