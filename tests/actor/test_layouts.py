"""The parity matrix: one model, one ragged batch of rollouts and demonstrations, every layout against one rank."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from megatron_hpt.config import ActorConfig, dump_yaml
from megatron_hpt.examples import tiny_llama, tiny_mixtral, tiny_qwen3

from .test_actor import WORKER, Layouts

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5

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
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.parallel.ranks}"]
        arguments = [WORKER, out / "config.yaml", self.folder / "ledger", out, 0, 3, "--probe"]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients = [load_file(out / f"after_{n}" / "model.safetensors") for n in (1, 3)]
        return Probe(json.loads((out / "metrics.json").read_text()), gradients)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama.write(folder / "model", hidden=64, layers=4, heads=4, kv_heads=2, positions=64)
    return Matrix(folder, folder / "model")


@pytest.fixture(scope="module")
def one_dense(dense: Matrix) -> Probe:
    return dense.probe("one", budget=10_000)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("sparse")
    tiny_mixtral.write(folder / "model")
    return Matrix(folder, folder / "model")


@pytest.fixture(scope="module")
def one_sparse(sparse: Matrix) -> Probe:
    return sparse.probe("one", budget=10_000)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3.write(folder / "model", head_dim=32, tied=True)
    return Matrix(folder, folder / "model")


@pytest.fixture(scope="module")
def one_qwen3(qwen3: Matrix) -> Probe:
    return qwen3.probe("one", budget=10_000)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_qwen3.write(folder / "model", head_dim=32, experts=4)
    return Matrix(folder, folder / "model")


@pytest.fixture(scope="module")
def one_qwen3_moe(qwen3_moe: Matrix) -> Probe:
    return qwen3_moe.probe("one", budget=10_000)


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


@pytest.mark.parametrize("layout", DENSE)
def test_dense_layouts_equal_one_rank(dense: Matrix, one_dense: Probe, layout: str) -> None:
    assert worst(dense.probe(layout, budget=40, **DENSE[layout]), one_dense) < TOLERANCE


@pytest.mark.parametrize("layout", SPARSE)
def test_mixtures_of_experts_equal_one_rank(sparse: Matrix, one_sparse: Probe, layout: str) -> None:
    assert worst(sparse.probe(layout, budget=40, **SPARSE[layout]), one_sparse) < TOLERANCE


@pytest.mark.parametrize("layout", QWEN3)
def test_norms_of_queries_and_keys_equal_one_rank(qwen3: Matrix, one_qwen3: Probe, layout: str) -> None:
    assert any("q_norm" in name for name in one_qwen3.gradients[0])
    assert worst(qwen3.probe(layout, budget=40, **QWEN3[layout]), one_qwen3) < TOLERANCE


@pytest.mark.parametrize("layout", QWEN3_MOE)
def test_qwen3_with_experts_equals_one_rank(qwen3_moe: Matrix, one_qwen3_moe: Probe, layout: str) -> None:
    assert worst(qwen3_moe.probe(layout, budget=40, **QWEN3_MOE[layout]), one_qwen3_moe) < TOLERANCE


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(dense: Matrix, one_dense: Probe, recompute: str) -> None:
    found = dense.probe(recompute, budget=40, recompute=recompute, tensor=2, context=2, sequence=True)
    assert worst(found, one_dense) < TOLERANCE


def test_one_row_a_micro_batch_equals_packed_rows(dense: Matrix, one_dense: Probe) -> None:
    assert worst(dense.probe("single", budget=1), one_dense) < TOLERANCE
