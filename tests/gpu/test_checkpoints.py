"""Checkpoints between a host and GPUs: weights, optimizer and whatever else a resume needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt.overrides import dump_yaml
from tests.actor.test_actor import STEPS, WORKER, Layouts
from tests.actor.test_reshard import update_error
from tests.ranks import ONE_RANK

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("devices"), tiny_model)


def on_host(layouts: Layouts, name: str, *options: str, first: int, last: int) -> None:
    """Run a rank that sees no GPU; it has a process of its own, because Megatron's state is of a process."""
    out = layouts.folder / name
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(layouts.config(64)))
    command = [WORKER, out / "config.yaml", layouts.folder / "ledger", out, first, last, *options]
    environment = {**os.environ, **ONE_RANK, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_on_on_a_gpu_and_back_on_the_host(layouts: Layouts) -> None:
    expected = layouts.run("on_gpu")
    on_host(layouts, "begun", "--save", str(layouts.folder / "saved_1"), first=0, last=1)
    layouts.run(
        "carried_on", "--load", str(layouts.folder / "saved_1"), "--save", str(layouts.folder / "saved_2"), first=1, last=2
    )
    on_host(
        layouts, "ended", "--load", str(layouts.folder / "saved_2"), "--save", str(layouts.folder / "saved_3"), first=2, last=3
    )
    found = layouts.run("read", "--load", str(layouts.folder / "saved_3"), first=STEPS, last=STEPS)
    assert update_error(layouts, found, expected) < 1e-3
