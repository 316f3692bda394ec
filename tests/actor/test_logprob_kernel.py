"""The Triton passes: right in Triton's interpreter, and compiled for Hopper and Blackwell. No GPU is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_hpt.actor.model import logprob_kernel  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.gpu]
ROOT = Path(__file__).parents[2]
ALIGNED = re.compile(r"\*|.*stride$|width$")
"""Of a type or a name: what is a multiple of 16 for every tile but the last, so that the runtime compiles for that."""
SIGNATURES = {
    logprob_kernel.statistics_kernel: {"logits": "*fp32", "columns": "*i64", "into": "*fp32", "row_stride": "i32"},
    logprob_kernel.gradient_kernel: {
        "logits": "*fp32",
        "grad": "*bf16",
        "columns": "*i64",
        "per_token": "*fp32",
        "row_stride": "i32",
        "grad_stride": "i32",
    },
}
REST = {"width": "i32", "inverse_temperature": "fp32", "BLOCK": "constexpr"}


def test_the_interpreter_computes_what_torch_does() -> None:
    """In a process of its own, because Triton reads the variable when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name("interpreted_kernel.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kernel", SIGNATURES, ids=lambda kernel: kernel.fn.__name__)
def test_compiles_without_spills(kernel, capability: int, aligned: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # compiled now, not found
    signature = {**SIGNATURES[kernel], **REST}
    names = [i for i, (name, kind) in enumerate(signature.items()) if ALIGNED.match(kind) or ALIGNED.match(name)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={"BLOCK": logprob_kernel.BLOCK},
        attrs={(index,): [["tt.divisibility", 16]] for index in names} if aligned else None,
    )
    options = {"num_warps": logprob_kernel.WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}a" in ptx
    assert ("ld.global.v4" in ptx) == aligned
    report = resources(ptx, capability, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= 96, report  # five programs fit on a multiprocessor


@pytest.mark.parametrize("capability", [90, 100])
def test_a_block_is_read_by_all_warps_before_it_is_overwritten(capability: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = logprob_kernel.gradient_kernel
    source = ASTSource(fn=kernel, signature={**SIGNATURES[kernel], **REST}, constexprs={"BLOCK": logprob_kernel.BLOCK})
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": logprob_kernel.WARPS}).asm[
        "ptx"
    ]
    reads, barriers, writes = (
        [match.start() for match in re.finditer(what, ptx)] for what in (r"ld\.global", r"bar\.sync", r"st\.global")
    )
    assert len(barriers) == 1
    assert max(reads) < barriers[0] < min(writes)
    assert "ld.global.nc" not in ptx  # such reads may see old bytes
    assert "cvt.rn.bf16" in ptx  # to the nearest; the interpreter cuts bits off


def resources(ptx: str, capability: int, folder: Path) -> str:
    """What the assembler says of registers and spills."""
    (folder / "kernel.ptx").write_text(ptx)
    files = [str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}a", *files]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
