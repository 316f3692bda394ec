"""Folders for temporary files: removed at the end, or by whoever comes next."""

import subprocess
import sys
import tempfile
import time
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
    code = "import tempfile, glob; print(tempfile.mkdtemp(), *glob.glob(tempfile.gettempdir() + '/torchinductor_*'))"
    made = subprocess.check_output([sys.executable, "-c", code], env=scratch.environment, text=True).split()
    assert {Path(name).parent for name in made} == {scratch.path}
    (compiled,) = tmp.glob("torchinductor_*")
    (Path(made[1]) / "header.h").touch()  # what torch has compiled is for every process
    scratch.close()
    scratch.close()
    assert list(tmp.iterdir()) == [compiled]
    assert [path.name for path in compiled.iterdir()] == ["header.h"]


def test_the_next_one_removes_those_of_the_killed_alone(tmp: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, alive = (subprocess.Popen([sys.executable, "-c", HOLD], **pipes) for _ in range(2))
    paths = [Path(process.stdout.readline().strip()) for process in (killed, alive)]
    killed.kill()
    killed.wait()
    (tmp / "hpt-of-somebody-else").mkdir()
    while paths[0].exists():  # its custodian may be at it
        sweep()
        time.sleep(0.05)
    assert paths[1].is_dir()
    assert (tmp / "hpt-of-somebody-else").is_dir()
    alive.communicate("\n")
