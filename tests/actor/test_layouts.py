"""The parity matrix: one model, one ragged batch of rollouts and demonstrations, every layout against one rank."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hpt.config import ActorConfig
from megatron_hpt.examples import tiny_families, tiny_llama
from megatron_hpt.overrides import dump_yaml
from tests import fake_gpu
from tests.ranks import run_ranks

from .test_actor import WORKER, Layouts

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
TOLERANCE = 2e-5 if fake_gpu.IS_REHEARSAL else 1e-5
"""Rounding: the rehearsal's grouped products add up in another order."""

DENSE: dict[str, dict] = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP2, VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "TP2, SP": {"tensor": 2, "sequence": True},
    "DP2": {"data": 2},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
    "TP2 x CP2": {"tensor": 2, "context": 2},
    "TP2 x CP2, SP": {"tensor": 2, "context": 2, "sequence": True},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
    "PP2 x CP2, VPP2": {"pipeline": 2, "context": 2, "virtual_pipeline": 2},
}
SPARSE: dict[str, dict] = {
    "EP2": {"data": 2, "expert": 2},
    "EP2 of CP2": {"context": 2, "expert": 2},
    "TP2, SP, ETP2": {"tensor": 2, "sequence": True},
    "TP2, SP, EP2, ETP1": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
    "PP2 x DP2, EP2": {"pipeline": 2, "data": 2, "expert": 2},
}
LLAMA_3: dict[str, dict] = {
    "CP2": {"context": 2},
    "PP2 x CP2, VPP2": {"pipeline": 2, "context": 2, "virtual_pipeline": 2},
}
QWEN2: dict[str, dict] = {
    "TP2, SP": {"tensor": 2, "sequence": True},
    "TP4, 2 groups": {"tensor": 4},
    "TP4, SP, 2 groups": {"tensor": 4, "sequence": True},
    "TP4 x CP2, SP, 2 groups": {"tensor": 4, "context": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}
QWEN3: dict[str, dict] = {
    "TP2": {"tensor": 2},
    "TP2, SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}
QWEN3_MOE: dict[str, dict] = {
    "TP2, SP, ETP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "EP2": {"data": 2, "expert": 2},
}


@dataclass
class Probe:
    sums: list[dict]
    gradients: list[dict[str, torch.Tensor]]


class Matrix(Layouts):
    def probe(self, name: str, *, budget: int = 64, recompute: str = "none", **parallel) -> Probe:
        out = self.folder / name.replace(" ", "_")
        out.mkdir()
        config = self.config(budget, **parallel)
        config.actor = ActorConfig(micro_batch_tokens=budget, recompute=recompute)
        # With the usual epsilon, elements whose gradient is mere rounding move as far as all others in Adam's first steps.
        config.optimizer.eps = 1e-6
        (out / "config.yaml").write_text(dump_yaml(config))
        arguments = [out / "config.yaml", self.folder / "ledger", out, 0, 3, "--probe"]
        run_ranks(WORKER, *arguments, ranks=config.parallel.ranks)
        gradients = [load_file(out / f"after_{n}" / "model.safetensors") for n in (1, 3)]
        return Probe(json.loads((out / "metrics.json").read_text()), gradients)


MODELS: dict[str, tuple[Callable[[Path], None], dict[str, dict]]] = {
    "dense": (partial(tiny_llama.write, hidden=64, layers=4, heads=4, kv_heads=2, positions=64), DENSE),
    "sparse": (tiny_families.MODELS["mixtral"], SPARSE),
    "llama 3": (tiny_families.MODELS["llama 3"], LLAMA_3),
    "qwen2": (tiny_families.MODELS["qwen2"], QWEN2),
    "qwen3": (
        # In four layers, the gradients of the norms cancel so far that rounding alone is 2e-5 of them.
        partial(tiny_families.write, model_type="qwen3", tie_word_embeddings=True, num_hidden_layers=2),
        QWEN3,
    ),
    "qwen3_moe": (tiny_families.MODELS["qwen3_moe"], QWEN3_MOE),
}
"""Name → writer, layouts to compare with one rank."""


@pytest.fixture(scope="module")
def matrix_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Matrix, Probe]]:
    """From a model's name to its matrix and what one rank computes, once."""

    @cache
    def made(name: str) -> tuple[Matrix, Probe]:
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        MODELS[name][0](folder / "model")
        matrix = Matrix(folder, folder / "model")
        return matrix, matrix.probe("one", budget=10_000)

    return made


def worst(found: Probe, expected: Probe) -> float:
    """Largest relative error of a loss, its parts, or a parameter's gradient."""
    errors = [
        abs(a[key] - b[key]) / abs(b[key])
        for a, b in zip(found.sums, expected.sums, strict=True)
        for key in ("loss", "loss_rollouts", "loss_demonstrations", "entropy")
    ]
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert ours.keys() == theirs.keys()
        errors += [float((ours[name] - g).double().norm() / g.double().norm()) for name, g in theirs.items()]
    return max(errors)


THOROUGH = {("qwen2", "TP4 x CP2, SP, 2 groups"), ("qwen2", "TP4, 2 groups"), ("dense", "TP2 x CP2"), ("qwen3_moe", "EP2")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        pytest.param(model, layout, marks=[pytest.mark.thorough] * ((model, layout) in THOROUGH))
        for model, (_, layouts) in MODELS.items()
        for layout in layouts
    ],
)
def test_layouts_equal_one_rank(matrix_of, model: str, layout: str) -> None:
    """In test-all alone: layouts whose parts are proved by those of the others."""
    matrix, one = matrix_of(model)
    assert worst(matrix.probe(layout, budget=40, **MODELS[model][1][layout]), one) < TOLERANCE


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=pytest.mark.thorough), "full"])
def test_recomputation_changes_nothing(matrix_of, recompute: str) -> None:
    """In test-all alone: a part of what is recomputed beside all of it."""
    dense, one = matrix_of("dense")
    found = dense.probe(recompute, budget=40, recompute=recompute, tensor=2, context=2, sequence=True)
    assert worst(found, one) < TOLERANCE


def test_one_row_a_micro_batch_equals_packed_rows(matrix_of) -> None:
    dense, one = matrix_of("dense")
    assert worst(dense.probe("single", budget=1), one) < TOLERANCE
