"""What dead processes leave in shared memory goes, whoever was killed: engines, their supervisor, or both and the custodian."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.launch.custodian import NOTES, mapped_by_anybody
from megatron_hpt.launch.scratch import Scratch, sweep

pytestmark = pytest.mark.slow

LEAVES = """
import mmap, os, pathlib, signal, sys, time, multiprocessing
from multiprocessing import resource_tracker
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = pathlib.Path("/dev/shm") / sys.argv[1]
path.write_bytes(b"x" * 4096)
with path.open("r+b") as file:
    kept = mmap.mmap(file.fileno(), 0)
lock = multiprocessing.get_context("spawn").Lock()
os.kill(resource_tracker._resource_tracker._pid, 9)
print("has", lock._semlock.name, "ready", flush=True)
time.sleep(float(sys.argv[3]))
os._exit(3)
"""
"""As SGLang's load figures and semaphores."""
SUPERVISOR = """
import os, sys, time
from pathlib import Path
from megatron_hpt.launch.children import Child
from megatron_hpt.launch.scratch import Scratch
scratch = Scratch()
child = Child.start("engine", [sys.executable, "-c", *sys.argv[2:]], Path(sys.argv[1]), {**os.environ, **scratch.environment})
print(scratch.path, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield tmp_path
    for path in Path("/dev/shm").glob(f"hpt_left_{os.getpid()}*"):
        path.unlink()


NAME = f"hpt_left_{os.getpid()}"


def engine(scratch: Scratch, tmp: Path, how: str = "polite", seconds: float = 600) -> tuple[Child, list[Path]]:
    command = [sys.executable, "-c", LEAVES, NAME, how, str(seconds)]
    child = Child.start("engine", command, tmp / "engine.log", {**os.environ, **scratch.environment})
    return child, left_by(child.log)


def left_by(log: Path) -> list[Path]:
    until(lambda: log.is_file() and "ready" in log.read_text(encoding="utf-8"))
    semaphore = log.read_text(encoding="utf-8").split()[1].removeprefix("/")
    left = [Path("/dev/shm") / NAME, Path(f"/dev/shm/sem.{semaphore}")]
    assert all(path.exists() for path in left)
    return left


def until(condition, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def noted(folder: Path, paths: list[Path]) -> bool:
    notes = folder / NOTES
    return notes.is_file() and all(path.name in notes.read_text() for path in paths)


@pytest.mark.parametrize("end", ["dies by itself", "is killed"])
def test_an_engine_that_is_gone_leaves_nothing_while_the_run_goes_on(tmp: Path, end: str) -> None:
    scratch = Scratch()
    child, left = engine(scratch, tmp, seconds=1.5 if end == "dies by itself" else 600)
    until(lambda: noted(scratch.path, left))
    if end == "is killed":
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait(30)
    until(lambda: not any(path.exists() for path in left))
    scratch.close()


def test_the_end_of_a_run_leaves_nothing(tmp: Path) -> None:
    scratch = Scratch()
    child, left = engine(scratch, tmp)
    until(lambda: noted(scratch.path, left))
    os.killpg(child.process.pid, signal.SIGKILL)
    stop_all([child])
    scratch.close()
    assert not any(path.exists() for path in (*left, scratch.path))


@pytest.mark.parametrize("how", ["polite", "stubborn"])
def test_a_killed_supervisor_leaves_nothing(tmp: Path, how: str) -> None:
    log = tmp / "engine.log"
    command = [sys.executable, "-c", SUPERVISOR, str(log), LEAVES, NAME, how, "600"]
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folder, left = Path(supervisor.stdout.readline().strip()), left_by(log)
    until(lambda: noted(folder, left))
    supervisor.kill()
    supervisor.wait()
    until(lambda: not any(path.exists() for path in (*left, folder)))


def test_what_all_of_the_killed_left_goes_with_the_next_run(tmp: Path) -> None:
    log = tmp / "engine.log"
    command = [sys.executable, "-c", SUPERVISOR, str(log), LEAVES, NAME, "polite", "600"]
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folder, left = Path(supervisor.stdout.readline().strip()), left_by(log)
    until(lambda: noted(folder, left))
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        words = found.read_bytes().split(b"\0")
        if b"megatron_hpt.launch.custodian" in words and str(folder).encode() in words:
            os.kill(int(found.parent.name), signal.SIGKILL)
    supervisor.kill()
    supervisor.wait()
    until(lambda: NAME not in {path.name for path in mapped_by_anybody()})
    assert all(path.exists() for path in left)
    sweep()
    assert not any(path.exists() for path in (*left, folder))


def test_a_file_that_another_program_uses_stays(tmp: Path) -> None:
    scratch = Scratch()
    child, left = engine(scratch, tmp)
    until(lambda: noted(scratch.path, left))
    code = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, str(left[0])], **pipes)
    other.stdout.readline()
    stop_all([child])
    scratch.close()
    assert [path.exists() for path in left] == [True, False]
    other.communicate(b"\n")
