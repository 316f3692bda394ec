"""The kernels of docs/gpu.md's table: Megatron's objects have them, and they compute what plain operators do."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_hpt.actor.model.kernels import KERNELS
from megatron_hpt.config import ActorConfig, ModelConfig
from megatron_hpt.examples.tiny_families import MODELS
from megatron_hpt.models.conversion import ToHf
from megatron_hpt.overrides import dump_yaml
from tests import fake_gpu
from tests.actor.test_actor import Layouts
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
BUILT = Path(__file__).with_name("built.py")
LAYOUTS = [{}, {"data": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}]
WIDE = pytest.mark.skipif(not fake_gpu.IS_REHEARSAL, reason="Transformer Engine's attention knows no float32 on a GPU")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layouts]:
    """Batches of a dense model and of a mixture."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama", "mixtral")}
    for name, folder in folders.items():
        MODELS[name](folder / "model")
    return {name: Layouts(folder, folder / "model") for name, folder in folders.items()}


def test_megatron_has_what_the_table_says(families: dict[str, Layouts], tmp_path: Path) -> None:
    layouts = families["mixtral"]
    model = ModelConfig(path=str(layouts.model), dtype="bfloat16")
    config = layouts.config(64, data=2, pipeline=2).model_copy(update={"model": model})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    run_ranks(BUILT, tmp_path / "config.yaml", tmp_path / "built.json", ranks=4, ALL_KERNELS="1")
    found = json.loads((tmp_path / "built.json").read_text())
    assert {flag for flag in KERNELS if found[flag]} == KERNELS.keys() - {"overlap_p2p_comm"}
    assert found["in place"] > 0
    assert found["grouped"] > 0
    assert not found["deterministic_mode"]


@WIDE
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_with_all_kernels_are_those_with_none(families: dict[str, Layouts], family: str, parallel: dict) -> None:
    layouts, name = families[family], "_".join(map(str, parallel)) or "one"
    none = ActorConfig(micro_batch_tokens=64, kernels=dict.fromkeys(KERNELS, False))
    # Permutation too, though its kernels are interpreted here; once is enough.
    fused = ActorConfig(micro_batch_tokens=64, kernels={"moe_permute_fusion": family == "mixtral" and not parallel})
    plain = layouts.run(f"plain_{name}", "--gradients", last=1, sections={"actor": none}, **parallel)
    found = layouts.run(f"fused_{name}", "--gradients", last=1, sections={"actor": fused}, **parallel)
    assert found.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-5)
    errors = {name: float((found.weights[name] - g).norm() / g.norm()) for name, g in plain.weights.items()}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)


@WIDE
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}], ids=str)
def test_gradients_with_tritons_log_probabilities_are_those_with_torchs(families: dict[str, Layouts], parallel: dict) -> None:
    layouts, name, found = families["llama"], "_".join(map(str, parallel)) or "one", {}
    for kernel in ("torch", "triton"):
        actor = ActorConfig(micro_batch_tokens=64, logprob_kernel=kernel)
        found[kernel] = layouts.run(f"{kernel}_{name}", "--gradients", last=1, sections={"actor": actor}, **parallel)
    ours, theirs = found["triton"], found["torch"]
    assert ours.metrics[0] == pytest.approx(theirs.metrics[0], rel=1e-5, abs=1e-5)  # a gap to the engine is rounding itself
    errors = {name: float((ours.weights[name] - g).norm() / g.norm()) for name, g in theirs.weights.items()}
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)


def test_grouped_experts_are_written_and_read_as_single_ones(families: dict[str, Layouts], tmp_path: Path) -> None:
    """Saved by one form, read and saved by the other, read in another layout, converted: bit for bit the same."""
    layouts, first, second = families["mixtral"], tmp_path / "grouped", tmp_path / "single"
    sections = {"actor": ActorConfig(micro_batch_tokens=64, kernels={"moe_grouped_gemm": False})}
    grouped = layouts.run("grouped", "--save", str(first), last=1)
    single = layouts.run("single", "--load", str(first), "--save", str(second), first=1, last=1, sections=sections)
    again = layouts.run("again", "--load", str(second), first=1, last=1, data=2, expert=2)
    ToHf(first).write(tmp_path / "hf")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    for name, weight in grouped.weights.items():
        assert weight.equal(single.weights[name]), name
        assert weight.equal(again.weights[name]), name
        assert weight.equal(converted[name]), name
