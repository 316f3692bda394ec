"""One whole run of `recipes/quickstart.py` on one GPU: supervisor, coordinator, vLLM, trainer, weights by `cuda_ipc`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from .measurement import Measurement
from .sizes import Sizes

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.py"
ON_ONE_GPU = (
    *("parallel.tensor=1", "model.dtype=bfloat16", "transfer.transport=cuda_ipc", "rollout.gpu_memory_share=0.3"),
    *("trainer.steps=40", "trainer.save_every=20", "evaluation.every=20"),
)
"""The recipe's ranks and engine on the same GPU, which needs no memory back; as many steps as a visit has time for."""
VLLM = Version("0.32")
"""What `engines/vllm/` is written against. 0.26, the newest for torch 2.11, labels no weights (/weight_info) and has no
``--enable-scale-out``."""


def quickstart(sizes: Sizes) -> Iterator[Measurement]:
    """Train the recipe as a user does, and say what came of it; a rehearsal starts no engine."""
    check = "quickstart"
    if sizes.device.type != "cuda":
        yield Measurement(check, "the run", note="an engine is not started in a rehearsal; `make train` trains it on the host")
        return
    if reason := missing():
        yield Measurement(check, "the run", note=reason)
        return
    started = time.monotonic()
    done = subprocess.run(command(), capture_output=True, text=True, encoding="utf-8", errors="replace")
    seconds = time.monotonic() - started
    yield from outcome(Path("runs"), seconds)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        yield Measurement(check, "the rest", note=f"failed: {' / '.join(lines[-3:])}")


def missing() -> str:
    """Return why no engine can be started here; empty where one can."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "vLLM is not installed here"
    return "" if Version(version) >= VLLM else f"vLLM {version} is installed here, and the engine's client needs {VLLM}"


def command() -> list[str]:
    """Return the run's command line."""
    return [sys.executable, "-m", "megatron_hpt.cli", "train", str(RECIPE), *ON_ONE_GPU]


def outcome(runs: Path, seconds: float) -> Iterator[Measurement]:
    """Yield what the newest run below a folder has measured.

    Args:
        seconds: what the whole run took.
    """
    from megatron_hpt.telemetry import metrics

    check = "quickstart"
    newest = max(runs.glob("quickstart-*/metrics.jsonl"), key=lambda path: path.stat().st_mtime, default=None)
    lines = metrics.read(newest) if newest else []
    yield Measurement(check, "steps trained", len(lines), "", 40, 40)
    if not lines:
        return
    yield Measurement(check, "the whole run, starts included", seconds, "s", None, 150)
    in_steps = sorted(line["time/step_s"] for line in lines)
    yield Measurement(check, "a step, median", in_steps[len(in_steps) // 2], "s", None, 1.5)
    gaps = [line["mismatch/k3_kl"] for line in lines if line["mismatch/k3_kl"] is not None]
    yield Measurement(check, "engine beside trainer, largest mismatch/k3_kl", max(gaps, default=None), "", None, 1e-2)
    first, last = (line["rollout/accuracy"] for line in (lines[0], lines[-1]))
    yield Measurement(check, "accuracy of rollouts, last step less first", last - first, "", 0.02, None)
