"""A run that is killed again and again, anywhere, ends with the weights of a run that was left alone, bit for bit."""

import contextlib
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_hpt.models.checkpoints import damage

from .conftest import OnShared
from .runs import RECIPE, SMALL, Run
from .test_training import sha256

pytestmark = pytest.mark.slow


def last_step(kills: int) -> int:
    """Steps enough for so many kills."""
    return 6 + 4 * kills


def settings(kills: int) -> tuple[str, ...]:
    """Two updates a batch, so that a kill may come between them."""
    steps = (f"trainer.steps={last_step(kills)}", "trainer.save_every=2", "trainer.updates_per_batch=2")
    return *steps, "evaluation.sets={}", *SMALL


def kill_somebody(run: Run, rng: random.Random) -> str:
    """Kill a random process of the run: while it starts, or in the seconds after a step; returns whom.

    Nobody, if it comes to its end before, as a run does that had only lost a helper.
    """
    lines, deadline = run.lines(), time.monotonic() + (180 if rng.random() < 0.7 else rng.uniform(0, 20))
    while run.lines() <= lines and time.monotonic() < deadline and run.process.poll() is None:
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 3))
    if run.process.poll() is not None:
        return "nobody"
    # Not Python's resource trackers: they are what removes the semaphores of a killed engine.
    mortals = {p: command for p in run.processes() if (command := _command(p)) and "resource_tracker" not in command}
    victim = rng.choice([psutil.Process(run.process.pid), *mortals])
    command = _command(victim)
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    return f"{command[:80]} after {run.lines()} steps"


def _command(process: psutil.Process) -> str:
    """Its command line; empty once it has ended, buried or not."""
    try:
        return " ".join(process.cmdline()[1:])
    except psutil.NoSuchProcess:
        return ""


def ended(run: Run, seconds: float = 30) -> bool:
    """Whether a run ends within a while, or before some more steps: it goes on when only a helper was killed."""
    deadline, enough = time.monotonic() + seconds, run.lines() + 4
    while run.process.poll() is None and time.monotonic() < deadline and run.lines() < enough:
        time.sleep(0.2)
    return run.process.poll() is not None


@pytest.mark.thorough
@pytest.mark.timeout(240 + 150 * 20)
def test_twenty_random_kills_do_not_change_the_weights(tmp_path: Path) -> None:
    """Adds any process at any moment to the kills of test_lag.py and of tests/slurm, which end with the same weights too."""

    def start(folder: Path, *arguments: str) -> Run:
        return Run.start(folder, str(RECIPE), *arguments)

    assert_kills_change_nothing(start, tmp_path, kills=20)


def assert_kills_change_nothing(start: Callable[..., Run], folder: Path, kills: int) -> None:
    """Train once alone and once with so many kills, in folders of their own."""
    alone = start(folder / "alone", *settings(kills))
    code, text = alone.finish(600)
    assert code == 0, text
    rng, work, run = random.Random(kills), folder / "killed", None
    for kill in range(kills):
        if run is None:
            resume = ["--resume"] if list(work.glob("runs/*/config.yaml")) else []
            run = start(work, *settings(kills), *resume)
        victim = kill_somebody(run, rng)
        print(f"{kill + 1}: killed {victim}", flush=True)
        if ended(run):
            code, text = run.finish()
            if code == 0:  # a helper was killed in the last steps
                assert run.lines() == last_step(kills), text
                break
            run = None
        for checkpoint in work.glob("runs/*/checkpoints/step_*"):
            assert damage(checkpoint) is None
    if run is None:
        run = start(work, *settings(kills), "--resume")
    code, text = run.finish(600)
    assert code == 0, text
    (killed,) = (config.parent for config in work.glob("runs/*/config.yaml"))
    assert sha256(killed / "export" / "model.safetensors") == sha256(alone.path / "export" / "model.safetensors")


def test_a_notice_saves_and_asks_to_be_started_again(on_shared: OnShared, tmp_path: Path) -> None:
    """SIGTERM; for SIGUSR1, and that the run goes on from there, see tests/slurm, where Slurm itself sends it."""
    settings = ("evaluation.sets={}", "parallel.tensor=1", *SMALL)
    run = on_shared.start(tmp_path / "work", "trainer.steps=1000", *settings)
    run.wait_until(lambda: run.lines() >= 2)
    run.process.send_signal(signal.SIGTERM)
    code, text = run.finish(60)
    assert code == 75, text
    assert "ended by SIGTERM after step" in text
    (checkpoint,) = run.path.glob("checkpoints/step_*")
    assert run.lines() == int(checkpoint.name.removeprefix("step_"))
