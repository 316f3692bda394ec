"""Every family on one rank against plain transformers: log-probabilities, loss and every parameter's gradient."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_hpt.examples import tiny_mixtral, tiny_qwen3
from megatron_hpt.examples.tiny_families import MODELS

from .test_actor import Layouts, Outcome, make_rows, reference_loss

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
WRITERS = {
    **{name: MODELS[name] for name in ("llama 3", "mistral", "qwen2", "qwen2, tied")},
    "mixtral": tiny_mixtral.write,
    "qwen3": partial(tiny_qwen3.write, head_dim=32),
    "qwen3_moe": partial(tiny_qwen3.write, experts=4, head_dim=32),
    "qwen3_moe, probabilities over all experts": partial(tiny_qwen3.write, experts=4, norm_topk_prob=False),
}


@pytest.mark.parametrize("family", WRITERS)
def test_logprobs_and_gradients_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    WRITERS[family](tmp_path / "model")
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
