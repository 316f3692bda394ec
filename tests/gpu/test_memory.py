"""Pinned memory of what rests on the host, on a device that counts it."""

import json
import subprocess
import sys

import pytest

from tests import fake_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
PROGRAM = """
import json, torch
from megatron_hpt.actor.optimizer.offload import Resting
weights = torch.arange(330 * 2**20 // 4, dtype=torch.int32, device="cuda")
rest = Resting([weights])
rest.leave()
held = torch.cuda.host_memory_stats()["allocated_bytes.current"]
rest.come_back()
print(json.dumps({"held": held, "right": bool((weights[:: 2**20].cpu() == torch.arange(0, len(weights), 2**20)).all())}))
"""


def test_a_copy_on_the_host_takes_no_more_pinned_memory_than_it_has_bytes() -> None:
    """Torch rounds a pinned allocation up to a power of two: 330 MiB took 512."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=fake_gpu.with_devices(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["right"]
    assert 330 * 2**20 <= found["held"] <= 331 * 2**20
