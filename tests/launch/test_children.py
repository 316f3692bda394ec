"""Taking processes down, and naming what failed."""

import mmap
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_hpt.launch import children
from megatron_hpt.launch.children import Child, describe_exit, failure_of, stop_all


def start(tmp_path: Path, code: str, name: str = "part", **environment: str) -> Child:
    return Child.start(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", {**os.environ, **environment})


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.is_file() and text in path.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stubborn_process_and_its_children_are_ended(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print('ready', flush=True); time.sleep(600)"
    )
    child = start(tmp_path, code)
    wait_for(child.log, "ready")
    family = [psutil.Process(child.process.pid), *psutil.Process(child.process.pid).children()]
    stop_all([child], grace_s=1.0)
    assert child.exit_code == -signal.SIGKILL
    _, alive = psutil.wait_procs(family[1:], timeout=10)  # init reaps what lost its parent
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_shared_memory_of_a_stubborn_process_goes_with_it(tmp_path: Path) -> None:
    code = (
        "import signal, time; from multiprocessing.shared_memory import SharedMemory;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); block = SharedMemory(create=True, size=64);"
        "print('has', block.name, 'ready', flush=True); time.sleep(600)"
    )
    child = start(tmp_path, code)
    wait_for(child.log, "ready")
    block = Path("/dev/shm") / child.output.split()[1]
    assert block.exists()
    stop_all([child], grace_s=0.5)
    assert not block.exists()
    assert child.exit_code == -signal.SIGKILL


def test_a_file_that_no_tracker_knows_of_goes_with_the_process_that_had_mapped_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SGLang's load figures; one that another process has mapped stays."""
    monkeypatch.setattr(children, "TRACKERS_S", 0.5)
    own, common = (Path(f"/dev/shm/megatron_hpt_{name}_{os.getpid()}") for name in ("own", "common"))
    for path in (own, common):
        path.write_bytes(b"x" * 4096)
    code = (
        "import mmap, os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"kept = [mmap.mmap(os.open(name, os.O_RDWR), 0) for name in {[str(own), str(common)]!r}];"
        "print('ready', flush=True); time.sleep(600)"
    )
    child = start(tmp_path, code)
    wait_for(child.log, "ready")
    with common.open("r+") as file, mmap.mmap(file.fileno(), 0):
        stop_all([child], grace_s=0.5)
        assert (own.exists(), common.exists()) == (False, True)
    common.unlink()


def test_a_semaphore_whose_tracker_was_killed_goes_with_its_process(tmp_path: Path) -> None:
    """As SGLang's, which kills all its children, the tracker among them. Its map shows a semaphore under another name."""
    code = (
        "import multiprocessing, os, time; from multiprocessing import resource_tracker;"
        "lock = multiprocessing.get_context('spawn').Lock(); os.kill(resource_tracker._resource_tracker._pid, 9);"
        "print('has', lock._semlock.name, 'ready', flush=True); time.sleep(600)"
    )
    child = start(tmp_path, code)
    wait_for(child.log, "ready")
    semaphore = Path(f"/dev/shm/sem.{child.output.split()[1].removeprefix('/')}")
    assert semaphore.exists()
    stop_all([child])
    assert not semaphore.exists()


def test_a_child_starts_again_when_nothing_is_left_of_it(tmp_path: Path) -> None:
    code = "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    child = start(tmp_path, code + "print('ready', os.environ['HPT_TEST'], flush=True); time.sleep(600)", HPT_TEST="7")
    wait_for(child.log, "ready 7")
    (left,) = psutil.Process(child.process.pid).children()
    child.process.kill()
    child.process.wait(30)
    again = child.again()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    deadline = time.monotonic() + 30
    while "ready 7" not in again.output:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (again.name, again.exit_code, again.log) == (child.name, None, child.log)
    stop_all([again])


def test_a_failure_has_name_exit_code_and_last_lines(tmp_path: Path) -> None:
    child = start(tmp_path, "print('working'); raise SystemExit(7)")
    child.process.wait(30)
    text = str(failure_of(child, tmp_path))
    assert text.startswith("part died (exit code 7); the last lines of ")
    assert text.endswith("    working")


def test_torchrun_names_the_rank(tmp_path: Path) -> None:
    report = "Root Cause (first observed failure):\n[0]:\n  rank      : 3 (local_rank: 1)\n  exitcode  : -9 (pid: 17)\n"
    child = start(tmp_path, f"print({report!r}); raise SystemExit(1)", "trainer")
    child.process.wait(30)
    failure = failure_of(child, tmp_path)
    assert (failure.name, failure.exit_code, failure.log) == ("trainer rank 3", -9, tmp_path / "trainer_rank3.log")


@pytest.mark.parametrize(("code", "words"), [(-9, "exit code -9, SIGKILL"), (-1000, "exit code -1000"), (3, "exit code 3")])
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
