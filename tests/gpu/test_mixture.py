"""A mixture of experts on a GPU without Transformer Engine, of which Megatron-Core's router reads a name all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt.examples.tiny_families import MODELS
from megatron_hpt.overrides import dump_yaml
from tests import fake_gpu
from tests.actor.test_actor import WORKER, Layouts
from tests.ranks import ONE_RANK

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
WITHOUT = """
import runpy, sys
sys.modules["transformer_engine"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_mixture_trains_on_our_own_layers(tmp_path: Path) -> None:
    MODELS["mixtral"](tmp_path / "model")
    layouts, out = Layouts(tmp_path, tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(layouts.config(64)))
    command = [sys.executable, "-c", WITHOUT, WORKER, out / "config.yaml", tmp_path / "ledger", out, 0, 1]
    environment = {
        **fake_gpu.with_devices(),
        **ONE_RANK,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TMPDIR": os.fspath(tmp_path),
    }
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "metrics.json").read_text())[0]["train/skip_reason"] is None
