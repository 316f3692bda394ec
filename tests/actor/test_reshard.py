"""Checkpoints through layouts: each saves what the next one loads, optimizer state included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hpt.config import ModelConfig
from megatron_hpt.examples import tiny_families, tiny_llama
from megatron_hpt.models.conversion import ToHf

from .test_actor import STEPS, Layouts, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.gpu]

DENSE = ({"tensor": 2, "pipeline": 2}, {"pipeline": 2, "context": 2, "virtual_pipeline": 2}, {"data": 3})
SPARSE = ({"pipeline": 2, "data": 2, "expert": 2}, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}, {})


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("dense")
    # A vocabulary that tensor parallel ranks pad, and rows that data parallel ranks cut in the middle.
    tiny_llama.write(folder / "model", hidden=64, layers=4, heads=4, kv_heads=2, positions=64)
    return Layouts(folder, folder / "model")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("sparse")
    tiny_families.MODELS["mixtral"](folder / "model")
    return Layouts(folder, folder / "model")


@pytest.mark.parametrize(("kind", "chain"), [("dense", DENSE), ("sparse", SPARSE)])
def test_training_goes_on_through_layouts(request: pytest.FixtureRequest, kind: str, chain: tuple[dict, ...]) -> None:
    layouts: Layouts = request.getfixturevalue(kind)
    expected, found = layouts.run("one"), None
    for step, parallel in enumerate(chain):
        load = ["--load", str(layouts.folder / f"saved_{step}")] if step else []
        save = ["--save", str(layouts.folder / f"saved_{step + 1}")]
        found = layouts.run(f"step_{step}", *load, *save, first=step, last=step + 1, **parallel)
    # Adam divides by the root of the second moment: a lost or misplaced moment, or a restarted step count, changes the
    # update by tens of per cent.
    assert len(chain) == STEPS
    assert update_error(layouts, found, expected) < 1e-3


@pytest.mark.parametrize("parallel", [{"data": 3}, {"tensor": 2, "sequence": True}], ids=["DP3", "TP2 SP"])
def test_a_resume_in_bfloat16_is_bitwise(dense: Layouts, parallel: dict) -> None:
    name = "_".join(parallel)
    options = {"sections": {"model": ModelConfig(path=str(dense.model), dtype="bfloat16")}, **parallel}
    saved = str(dense.folder / f"half_{name}")
    whole = dense.run(f"whole_{name}", **options)
    before = dense.run(f"before_{name}", "--save", saved, last=2, **options)
    ToHf(Path(saved)).write(dense.folder / f"exported_{name}")
    exported = load_file(dense.folder / f"exported_{name}" / "model.safetensors")
    assert all(torch.equal(exported[key], tensor) for key, tensor in before.weights.items())
    after = dense.run(f"after_{name}", "--load", saved, first=2, **options)
    assert all(torch.equal(after.weights[key], tensor) for key, tensor in whole.weights.items())
    assert after.metrics[-1]["train/loss"] == whole.metrics[-1]["train/loss"]


def update_error(layouts: Layouts, found: Outcome, expected: Outcome) -> float:
    """Of all parameters together, relative to how far training moved them."""
    start = load_file(layouts.model / "model.safetensors")
    difference = sum(float((found.weights[k] - w).double().square().sum()) for k, w in expected.weights.items())
    moved = sum(float((start[k] - w).double().square().sum()) for k, w in expected.weights.items())
    return (difference / moved) ** 0.5
