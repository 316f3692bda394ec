"""tools/gpu_check.py rehearsed on the host, where every check that needs no GPU really runs."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hpt import recipe
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.plan.timing import flops_per_token
from megatron_hpt.plan.topology import Slots, place_nodes
from tools.gpu_checks import actor, actor_process, hardware, quickstart
from tools.gpu_checks.measurement import Measurement, markdown, relative_error
from tools.gpu_checks.sizes import on_gpu, on_host
from tools.gpu_checks.variants import ENGINE, FP8, OURS, Variant

from .test_tools import ROOT, tool

Process = dict[tuple[str, str], dict[str, Any]]
"""What processes would find: (kind, name of the variant) → result."""


@pytest.mark.parametrize(
    ("measurement", "verdict"),
    [
        (Measurement("a", "b", 2.0, "x", 1, 3), "as expected"),
        (Measurement("a", "b", 4.0, "x", 1, 3), "NOT as expected"),
        (Measurement("a", "b", float("nan"), "x", None, 3), "NOT as expected"),
        (Measurement("a", "b", 4.0, "x"), "–"),
        (Measurement("a", "b", note="no FP8 here"), "left out"),
    ],
)
def test_verdicts(measurement: Measurement, verdict: str) -> None:
    assert measurement.verdict == verdict
    assert verdict in markdown([measurement]).splitlines()[-1]


def test_flops_of_a_known_model() -> None:
    llama_8b = ModelShape(
        family="llama", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256,
        tied_embeddings=False, rope_theta=5e5, norm_eps=1e-5, max_positions=8192,
    )  # fmt: skip
    weights = 8_030_261_248 - 128256 * 4096 - 65 * 4096  # without the embedding, which is looked up, and the norms
    assert flops_per_token(llama_8b, 0) == 6 * weights
    assert flops_per_token(llama_8b, 8192) - 6 * weights == 6 * 32 * 4096 * 8192


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    assert "no CUDA device" in tool("gpu_check.py", tmp_path, ok=False)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    """Every variant runs, in no process, and finds what the test puts here; what is not here has failed."""
    found: Process = {}

    def child(kind: str, variant: Variant, sizes: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
        if (kind, variant.name) not in found:
            raise RuntimeError(f"{variant.name} failed: no GPU")
        return found[kind, variant.name]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(actor, "_child", child)
    monkeypatch.setattr(Variant, "missing", lambda self: "")
    return found


def timed(loss: float) -> dict[str, float]:
    return {"loss": loss, "tokens_per_second": 30_000.0, "flops_per_token": 8e9, "peak_gib": 20.0, "kernels": "none"}


def verdicts(measurements: Iterator[Measurement], what: str) -> dict[str, str]:
    return {m.what: m.verdict for m in measurements if what in m.what}


def test_an_fp8_that_is_ignored_is_seen(processes: Process) -> None:
    """Transformer Engine's bfloat16 layers and our own differ by rounding, so FP8 that was ignored differs from ours too."""
    processes["steps", OURS.name], processes["steps", ENGINE.name] = timed(2.7703), timed(2.7705)
    for variant in FP8:
        processes["steps", variant.name] = timed(2.7705)
    found = verdicts(actor.steps(on_gpu(), 800.0), "loss beside bfloat16")
    assert (len(found), set(found.values())) == (len(FP8), {"NOT as expected"})
    for variant in FP8:
        processes["steps", variant.name] = timed(2.7698)
    assert set(verdicts(actor.steps(on_gpu(), 800.0), "loss beside bfloat16").values()) == {"as expected"}
    del processes["steps", ENGINE.name]
    assert not verdicts(actor.steps(on_gpu(), 800.0), "loss beside bfloat16")
    assert "gave nothing to compare with" in markdown(actor.steps(on_gpu(), 800.0))


def gradients(noise: float) -> dict[str, Any]:
    exact, wrong = (torch.randn(2, 500, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    return {"loss": 2.77 * (1 + noise / 100), "gradient": dict(zip("ab", exact + noise * wrong, strict=True))}


@pytest.mark.parametrize(("noise", "verdict"), [(1e-3, "NOT as expected"), (0.1, "as expected"), (0.3, "NOT as expected")])
def test_gradients_in_fp8_are_neither_bfloat16s_nor_far_from_them(processes: Process, noise: float, verdict: str) -> None:
    for variant in (actor.FLOAT32, OURS, ENGINE):
        processes["gradient", variant.name] = gradients(0.0)
    processes["gradient", FP8[0].name] = gradients(noise)
    found = [m for m in actor.parity(on_host()) if m.what == f"{FP8[0].name}: gradient"]
    assert [(m.check, m.verdict) for m in found] == [(f"parity with {ENGINE.name}", verdict)]


def test_a_process_that_fails_costs_only_its_own_lines(processes: Process) -> None:
    processes["gradient", actor.FLOAT32.name] = processes["gradient", OURS.name] = gradients(0.0)
    found = list(actor.parity(on_host()))
    assert {m.verdict for m in found if OURS.name in m.what} == {"as expected"}
    assert [m.note for m in found if m.what == ENGINE.name] == [f"{ENGINE.name} failed: no GPU"]


def test_delayed_scaling_is_measured_when_it_has_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first pass finds no history of maxima and computes with a scale of 1."""
    losses = iter((9.0, 2.77, 2.7701))
    stand_in = SimpleNamespace(accumulate=lambda actor, rows: ({"loss": next(losses)}, None))
    monkeypatch.setitem(sys.modules, "megatron_hpt.actor.train_step", stand_in)
    assert actor_process._settled(None, []) == 2.7701


def fp8_linear_errors() -> tuple[float, float, float]:
    """One layer with its operands rounded as the hybrid recipes round them, and a tenth more error than that."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator) for shape in ((512, 1024), (512, 1024), (512, 512)))

    def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.finfo(dtype).max / tensor.abs().max()
        return (tensor * scale).to(dtype).float() / scale

    x8, w8, g8 = rounded(x, torch.float8_e4m3fn), rounded(w, torch.float8_e4m3fn), rounded(g, torch.float8_e5m2)
    pairs = ((x8 @ w8.T, x @ w.T), (g8 @ w8, g @ w), (g8.T @ x8, g.T @ x))
    return tuple(1.1 * relative_error(*pair) for pair in pairs)


def test_limits_of_an_fp8_layer_leave_room_for_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "_linear_errors", lambda sizes, name: fp8_linear_errors() if name != "bfloat16" else (0, 0, 0)
    )
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "this_machine", lambda: SimpleNamespace(capability=(10, 0)))
    assert {m.verdict for m in hardware.transformer_engine(on_host())} == {"as expected"}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/gpu_check.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("gpu_check")
    del sys.modules["gpu_check"]


def test_what_may_be_wrong_comes_first_and_each_check_leaves_its_lines(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ("parity", "steps", "log_probabilities", "quickstart", "weights", "memory", "supervised")
    assert [name for name in program.CHECKS if name in told] == list(told)
    seconds = {}

    def run_one(out: Path, name: str, rehearse: bool, left: float) -> list[Measurement]:
        if seconds:
            assert f"of {list(seconds)[-1]}" in (tmp_path / "gpu_check.md").read_text()  # there before the next one begins
        seconds[name] = left
        return [Measurement(name, f"of {name}", 1.0)]

    monkeypatch.setattr(program, "run_one", run_one)
    table = program.run_all(tmp_path, rehearse=False)
    assert table == (tmp_path / "gpu_check.md").read_text()
    assert list(seconds) == list(program.CHECKS)
    assert all(seconds[name] <= check.longest for name, check in program.CHECKS.items())


def test_the_peers_model_is_of_its_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(on_gpu().supervised.model))
    shapes = hf_tensor_shapes(model_shape(tmp_path)).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == 596_049_920  # Qwen3-0.6B, tied embeddings counted once


def test_the_quickstart_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "in a rehearsal" in markdown(quickstart.quickstart(on_host()))

    def absent(name: str) -> str:
        raise quickstart.metadata.PackageNotFoundError(name)

    for version, reason in ((absent, "vLLM is not installed here"), (lambda _: "0.26.0", "vLLM 0.26.0 is installed here, and")):
        monkeypatch.setattr(quickstart.metadata, "version", version)
        (line,) = quickstart.quickstart(on_gpu())
        assert (line.verdict, line.note.startswith(reason)) == ("left out", True)
    monkeypatch.setattr(quickstart.metadata, "version", lambda _: "0.32.0")
    assert quickstart.missing() == ""


def test_the_quickstart_fits_one_gpu() -> None:
    source, *overrides = quickstart.command()[quickstart.command().index("train") + 1 :]
    topology = place_nodes(recipe.load(source, overrides).config, Slots("one GPU", 1, 1))
    assert topology.is_colocated


def test_the_quickstarts_figures(tmp_path: Path) -> None:
    run = tmp_path / "quickstart-1"
    run.mkdir()
    line = {"time/step_s": 1.0, "mismatch/k3_kl": 1e-4, "rollout/accuracy": 0.0}
    lines = [{**line, "step": step, "rollout/accuracy": step / 100} for step in range(40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert {m.verdict for m in quickstart.outcome(tmp_path, 100.0)} == {"as expected"}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**each, "mismatch/k3_kl": 0.5}) + "\n" for each in lines[:9]))
    found = {m.what: m.verdict for m in quickstart.outcome(tmp_path, 100.0)}
    assert found["steps trained"] == found["engine beside trainer, largest mismatch/k3_kl"] == "NOT as expected"
    assert [m.value for m in quickstart.outcome(tmp_path / "nothing", 1.0)] == [0]


@pytest.mark.thorough
def test_every_check_runs_on_the_host(tmp_path: Path) -> None:
    """Adds the rehearsal of what only a GPU's visitor runs; verdicts and figures are tested above."""
    table = tool("gpu_check.py", tmp_path, "--rehearse")
    assert "failed" not in table
    for what in (
        "our layers, float32: loss",
        "share of the bfloat16 ceiling",
        "held asleep",
        "Qwen3-0.6B, rows of 8192 tokens",
        "an engine is not started in a rehearsal",
        "chunks of 256 MiB",
        "whole exchange",
    ):
        assert what in table, table
    assert "left out: Transformer Engine is not installed" in table
    assert (tmp_path / "gpu_check.md").read_text().strip() in table
