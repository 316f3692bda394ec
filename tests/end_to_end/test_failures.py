"""Any process that dies ends the run within seconds, is named, and leaves nothing behind; so does Ctrl-C.

An engine that dies or hangs is started again where that is allowed.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_hpt.launch.scratch import sweep

from .conftest import OnShared
from .runs import RECIPE, SMALL, Run, gone
from .test_training import metrics

pytestmark = pytest.mark.slow
SETTINGS = ("trainer.steps=1000", "trainer.save_every=1", "evaluation.sets={}", *SMALL)
SECONDS = 60
"""For processes to be gone."""

Started = Callable[[Run], Run]


@pytest.fixture
def until_it_trains() -> Iterator[Started]:
    """Waits for a run's first step; at the end nothing of it may be left."""
    runs, processes = [], []

    def wait(run: Run) -> Run:
        runs.append(run)
        run.wait_until(lambda: run.lines() >= 1)
        processes.extend(run.processes())
        return run

    yield wait
    for run in runs:
        run.end()
    assert gone(processes) == []


def test_a_killed_rank_ends_the_run_and_is_named(on_shared: OnShared, until_it_trains: Started, tmp_path: Path) -> None:
    """The coordinator is killed in test_lag.py."""
    run = until_it_trains(on_shared.start(tmp_path, *SETTINGS))
    run.find("trainer rank 1").kill()
    code, text = run.finish()  # long before a deadline of the run, which are an hour
    assert code == 1
    assert "trainer rank 1 died (exit code -9, SIGKILL)" in text
    assert "the last lines of runs/" in text


def test_ctrl_c_ends_the_run(on_shared: OnShared, until_it_trains: Started, tmp_path: Path) -> None:
    run = until_it_trains(on_shared.start(tmp_path, *SETTINGS, "parallel.tensor=1"))
    run.process.send_signal(signal.SIGINT)
    code, text = run.finish()
    assert code == 130
    assert "ended by SIGINT" in text


def test_a_silent_engine_is_started_again_and_a_killed_supervisor_leaves_nothing_behind(
    until_it_trains: Started, tmp_path: Path
) -> None:
    """The engine hangs, its requests wait for the next one; then the process above everything is killed."""
    patience = ("parallel.tensor=1", "deadlines.health_s=1", "deadlines.silent_s=15")
    many = (
        "trainer.prompts_per_step=64"  # a batch is sampled for a while after a step's line is there, and the engine hangs then
    )
    run = until_it_trains(Run.start(tmp_path, str(RECIPE), *SETTINGS, *patience, many))
    hanging = run.find("engine 0")
    for process in (hanging, *hanging.children(recursive=True)):
        process.suspend()
    hung = run.lines()
    run.wait_until(lambda: not psutil.pid_exists(hanging.pid))
    run.wait_until(lambda: run.lines() > hung + 1)
    lines, processes = metrics(run.path), run.processes()
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert all(line["mismatch/k3_kl"] < 1e-4 for line in lines)
    run.process.kill()
    _, text = run.finish()
    assert "engine 0 gave no sign of life for 15 s (deadlines.silent_s) and is ended" in text
    assert "engine 0 died (exit code -9, SIGKILL) and is started again; restart 1 of 3" in text
    assert "engine 0 answers again" in text
    assert gone(processes, SECONDS) == []
    sweep()  # temporary files, which the next run on the machine removes


@pytest.mark.thorough
@pytest.mark.parametrize("victim", ["engine 0", "engine core"])
def test_a_killed_engine_ends_the_run_that_may_not_start_it_again(
    until_it_trains: Started, tmp_path: Path, victim: str
) -> None:
    """Adds real engines to tests/launch/evaluate/test_servers.py, whose engines die too often too."""
    run = until_it_trains(Run.start(tmp_path, str(RECIPE), *SETTINGS, "rollout.max_restarts=0"))
    run.find(victim).kill()
    code, text = run.finish()  # long before a deadline of the run, which are an hour
    assert code == 1
    assert "engine 0 died (exit code" in text


@pytest.mark.thorough
def test_a_killed_engine_is_started_again_and_the_run_completes(tmp_path: Path) -> None:
    """Adds the end of the run to the engine that hangs and is started again, and whole metrics."""
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
