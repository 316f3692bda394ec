"""After a push an engine is, bit for bit, the engine that was started from the weights: every layout, both engines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_hpt.examples import tiny_families, tiny_llama
from megatron_hpt.launch.launchers import free_port
from tests.engine_servers import Server, SharedEngines, greedy
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "TP1 of DP4": {"data": 4},
    "TP2 of DP2": {"tensor": 2, "data": 2},
    "PP2 of DP2": {"pipeline": 2, "data": 2},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
}
GROUPED = {**LAYOUTS, "TP4, 2 groups": {"tensor": 4}}
SPARSE = {
    **{name: {**layout, "sequence": "tensor" in layout} for name, layout in LAYOUTS.items()},
    "PP2, EP2": {"pipeline": 2, "data": 2, "expert": 2},
}
SMALL = {"hidden": 64, "layers": 2, "positions": 64}
MODELS = {
    "untied": lambda folder: tiny_llama.write(folder, **SMALL, heads=2, kv_heads=2),
    "tied": lambda folder: tiny_llama.write(folder, **SMALL, heads=2, kv_heads=2, tied=True),
    "biases": lambda folder: tiny_families.write(
        folder,
        "qwen2",
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=128,
        head_dim=None,
        tie_word_embeddings=True,
    ),
    "experts": lambda folder: tiny_families.write(
        folder,
        "qwen3_moe",
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
}
FEW = {name: GROUPED[name] for name in ("TP2 x PP2", "TP4, 2 groups")}
OF_MODEL = {"experts": SPARSE, "biases": FEW}
"""Other models than `LAYOUTS`; the others go through all of those in test-all."""
QUICK = {("vllm", 2, "biases"), ("sglang", 1, "experts")}
"""Every engine, every kind of tensor (tied, with a bias, of an expert), one and two ranks, in two starts."""
MATRIX = [
    pytest.param(kind, tensor, name, marks=() if (kind, tensor, name) in QUICK else pytest.mark.thorough)
    for kind in ("vllm", "sglang")
    for tensor in (1, 2)
    for name in MODELS
]


@pytest.mark.parametrize(("kind", "tensor", "name"), MATRIX)
def test_a_pushed_engine_is_a_fresh_engine(tmp_path: Path, kind: str, tensor: int, name: str) -> None:
    """In test-all alone: the other combinations of what two of them have each once."""
    model = tmp_path / "model"
    MODELS[name](model)
    server = Server.start(kind, model, tmp_path, tensor)
    try:
        fresh = server.ready().greedy()
        limits = server.config.data
        ((longest, _),) = greedy(kind, server.url, [[5] * limits.max_prompt_length], limits.max_response_length)
        assert len(longest) == limits.max_response_length
        layouts = {n: {**layout, "engine_tensor": tensor} for n, layout in OF_MODEL.get(name, LAYOUTS).items()}
        outcome = publish(tmp_path, model, layouts, kind, server.url)
        for layout, found in outcome.items():
            (own,), (doubled,) = found["own"], found["doubled"]
            assert [tuple(map(tuple, answer)) for answer in own] == [tuple(map(tuple, answer)) for answer in fresh], layout
            assert own != doubled, layout
            held = sum(p.stat().st_size for p in model.glob("*.safetensors"))
            assert held * 0.9 < found["bytes_own"] <= held
        for exported in sorted(tmp_path.glob("export_*")):
            assert_equal(load_file(exported / "model.safetensors"), load_file(model / "model.safetensors"))
    finally:
        server.stop()


def test_every_transport_serves_a_real_engine(tmp_path: Path, shared_engines: SharedEngines) -> None:
    """Also a second engine beside the first, which has had other weights, and a window for messages, as GPUs have."""
    used, model = shared_engines.server("vllm"), shared_engines.inputs / "model"
    files = {"transport": "files", "folder": str(tmp_path / "versions")}
    ways = {
        "gloo": {"transport": "gloo"},
        "files": files,
        "differences": {**files, "folder": str(tmp_path / "differences"), "full_every": 4},
    }
    layouts = {name: {"tensor": 2, "pipeline": 2, "transfer": way} for name, way in ways.items()}
    server = Server.start("vllm", model, tmp_path)
    try:
        fresh = [tuple(map(tuple, answer)) for answer in server.ready().greedy()]
        outcome = publish(tmp_path, model, layouts, "vllm", server.url, used.url)
        for name, found in outcome.items():
            assert [[tuple(map(tuple, answer)) for answer in engine] for engine in found["own"]] == [fresh] * 2, name
            assert all(doubled != own for doubled, own in zip(found["doubled"], found["own"], strict=True))
        assert sum(outcome["gloo"]["sent"]) == sum(outcome["gloo"]["received"])
    finally:
        server.stop()


def publish(folder: Path, model: Path, layouts: dict, kind: str, *urls: str) -> dict:
    """Run the publisher on four ranks."""
    layouts = {name: {**layout, "port": free_port("127.0.0.1")} for name, layout in layouts.items()}
    (folder / "layouts.json").write_text(json.dumps(layouts))
    out = folder / "out.json"
    publisher = Path(__file__).with_name("publisher.py")
    run_ranks(publisher, model, folder / "layouts.json", out, kind, *urls, ranks=4, timeout=280)
    return json.loads(out.read_text())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
