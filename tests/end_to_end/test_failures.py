"""Any process that dies ends the run within seconds, is named, and leaves nothing behind; so does Ctrl-C.

An engine that dies is started again where that is allowed.
"""

import signal
import time
from pathlib import Path

import pytest

from .runs import RECIPE, SMALL, Run, gone, shared_memory
from .test_training import metrics

pytestmark = pytest.mark.end_to_end
SECONDS = 20


@pytest.fixture
def running(tmp_path: Path):
    """A run that has finished its first step, and its processes; fails if it leaves something behind."""
    before = shared_memory()
    settings = ("trainer.steps=1000", "trainer.save_every=1", "rollout.max_restarts=0", "evaluation.sets={}", *SMALL)
    run = Run.start(tmp_path / "work", str(RECIPE), *settings)
    processes = []
    try:
        run.wait_until(lambda: run.lines() >= 1)
        processes = run.processes()
        yield run
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(60)
    assert gone(processes) == []
    assert shared_memory() <= before


@pytest.mark.parametrize(
    ("victim", "named"),
    [
        ("engine 0", "engine 0 died (exit code -9, SIGKILL)"),
        ("engine core", "engine 0 died (exit code"),
        ("trainer rank 1", "trainer rank 1 died (exit code -9, SIGKILL)"),
        ("coordinator", "coordinator died (exit code -9, SIGKILL)"),
    ],
)
def test_a_killed_process_ends_the_run_and_is_named(running: Run, victim: str, named: str) -> None:
    running.find(victim).kill()
    killed = time.monotonic()
    code, text = running.finish()
    assert time.monotonic() - killed < SECONDS
    assert code == 1
    assert named in text
    assert "the last lines of runs/" in text


def test_ctrl_c_ends_the_run(running: Run) -> None:
    running.process.send_signal(signal.SIGINT)
    started = time.monotonic()
    code, text = running.finish()
    assert time.monotonic() - started < SECONDS
    assert code == 130
    assert "ended by SIGINT" in text


def test_a_killed_supervisor_leaves_nothing_behind(running: Run) -> None:
    processes = running.processes()
    running.process.kill()
    running.process.wait()
    assert gone(processes, SECONDS) == []


def test_a_killed_engine_is_started_again_and_the_run_completes(tmp_path: Path) -> None:
    before = shared_memory()
    run = Run.start(tmp_path / "work", str(RECIPE), "trainer.steps=8", "evaluation.sets={}", *SMALL)
    run.wait_until(lambda: run.lines() >= 2)
    run.find("engine 0").kill()
    code, text = run.finish()
    assert code == 0, text
    assert "engine 0 died (exit code -9, SIGKILL) and is started again; restart 1 of 3" in text
    assert "engine 0 answers again" in text
    lines = metrics(run.path)
    assert [line["step"] for line in lines] == list(range(8))
    assert all(line["mismatch/k3_kl"] < 1e-4 and line["rollout/engines"] == 1 for line in lines)
    assert shared_memory() <= before
