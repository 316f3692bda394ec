"""tools/gpu_check.py rehearsed on the host, where every check that needs no GPU really runs."""

from pathlib import Path

import pytest
import torch

from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.timing import flops_per_token
from tools.gpu_checks.measurement import Measurement, markdown

from .test_tools import tool


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


@pytest.mark.thorough
def test_every_check_runs_on_the_host(tmp_path: Path) -> None:
    """Adds the rehearsal of what only a GPU's visitor runs; verdicts and figures are tested above."""
    table = tool("gpu_check.py", tmp_path, "--rehearse")
    assert "failed" not in table
    for what in (
        "our layers, float32: loss",
        "share of the bfloat16 ceiling",
        "held asleep",
        "chunks of 256 MiB",
        "whole exchange",
    ):
        assert what in table, table
    assert "left out: Transformer Engine is not installed" in table
    assert (tmp_path / "gpu_check.md").read_text().strip() in table
