"""tools/gpu_check.py on a device: what a visit to a GPU machine runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
NOT_COMPUTED = ("blockwise", "mxfp8", "quickstart", "triton")
"""What the stand-in for a GPU does not compute, and what a rehearsal leaves out."""


@pytest.mark.timeout(1500)
def test_every_check_ends_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), str(tmp_path / "out"), "--rehearse"]
    environment = {**fake_gpu.with_devices(), "PYTHONPATH": str(ROOT), "FAKE_GPU_FOLDER": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text().splitlines()]
    left_out = [line for line in lines if line["value"] is None and not any(name in str(line) for name in NOT_COMPUTED)]
    assert not left_out
    table = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "Fake H100" in table or not fake_gpu.IS_REHEARSAL
    assert "failed" not in "\n".join(line for line in table.splitlines() if not any(name in line for name in NOT_COMPUTED))
