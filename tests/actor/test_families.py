"""Every family on one rank against plain transformers: log-probabilities, loss and every parameter's gradient."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_hpt.examples.tiny_families import MODELS

from .test_actor import Layouts, Outcome, make_rows, reference_loss

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
TOLERANCE = 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_logprobs_and_gradients_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    MODELS[family](tmp_path / "model")
    found = Layouts(tmp_path, tmp_path / "model").run("one", "--gradients", last=1)
    sums, expected = found.metrics[0], reference_gradient(tmp_path / "model", tmp_path / "expected")
    assert sums["logprob_gap"] / sums["measured"] < 1e-6  # the first batch carries transformers' own log-probabilities
    assert sums["loss"] == pytest.approx(expected.metrics[0]["loss"], rel=TOLERANCE)
    assert found.weights.keys() == expected.weights.keys()
    errors = {name: float((found.weights[name] - g).norm() / g.norm()) for name, g in expected.weights.items()}
    assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


def reference_gradient(model: Path, out: Path) -> Outcome:
    """The first batch's loss and gradient; transformers itself writes the gradient under the names it has on disk."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total, _ = reference_loss(network, make_rows(model, seed=0))
    total.backward()
    for parameter in network.parameters():
        parameter.data = parameter.grad
    network.save_pretrained(out)
    return Outcome([{"loss": total.item()}], load_file(out / "model.safetensors"))
