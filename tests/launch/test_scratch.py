"""Folders for temporary files: removed at the end, or by whoever comes next."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_hpt.launch.scratch import Scratch, sweep

HOLD = """
from megatron_hpt.launch.scratch import Scratch
scratch = Scratch()
print(scratch.path, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_its_processes_write_into_it_and_it_is_removed(tmp: Path) -> None:
    scratch = Scratch()
    code = "import tempfile; print(tempfile.mkdtemp())"
    made = subprocess.check_output([sys.executable, "-c", code], env=scratch.environment, text=True).strip()
    assert Path(made).parent == scratch.path
    scratch.close()
    scratch.close()
    assert list(tmp.iterdir()) == []


def test_the_next_one_removes_those_of_the_killed_alone(tmp: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, alive = (subprocess.Popen([sys.executable, "-c", HOLD], **pipes) for _ in range(2))
    paths = [Path(process.stdout.readline().strip()) for process in (killed, alive)]
    killed.kill()
    killed.wait()
    (tmp / "hpt-of-somebody-else").mkdir()
    sweep()
    assert [path.is_dir() for path in paths] == [False, True]
    assert (tmp / "hpt-of-somebody-else").is_dir()
    alive.communicate("\n")
