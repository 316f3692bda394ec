"""A run that is killed again and again, anywhere, ends with the weights of a run that was left alone, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_hpt.data.checkpoints import damage

from .runs import RECIPE, SMALL, Run, shared_memory
from .test_training import sha256

pytestmark = pytest.mark.end_to_end
KILLS = int(os.environ.get("HPT_KILLS", "2"))
"""20 were run for docs/design.md; each costs a start."""
STEPS = 6 + 8 * KILLS
SETTINGS = (f"trainer.steps={STEPS}", "trainer.save_every=2", "evaluation.sets={}", *SMALL)


def kill_somebody(run: Run, rng: random.Random) -> str:
    """Kill a random process of the run: while it starts, or in the seconds after a step; returns whom."""
    lines = run.lines()
    if rng.random() < 0.7:
        run.wait_until(lambda: run.lines() > lines)
    else:
        time.sleep(rng.uniform(0, 20))
    time.sleep(rng.uniform(0, 3))
    # Not Python's resource trackers: they are what removes the semaphores of a killed engine.
    mortals = [p for p in run.processes() if "resource_tracker" not in " ".join(p.cmdline())]
    victim = rng.choice([psutil.Process(run.process.pid), *mortals])
    command = " ".join(victim.cmdline()[1:5])
    victim.kill()
    return f"{command} after {run.lines()} steps"


def ended(run: Run, seconds: float = 30) -> bool:
    """Whether a run ends within a while; it goes on when only a helper that nothing needs was killed."""
    deadline = time.monotonic() + seconds
    while run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    return run.process.poll() is not None


@pytest.mark.timeout(240 + 150 * KILLS)
def test_random_kills_do_not_change_the_weights(tmp_path: Path) -> None:
    alone = Run.start(tmp_path / "alone", str(RECIPE), *SETTINGS)
    code, text = alone.finish()
    assert code == 0, text
    before, rng, folder, run = shared_memory(), random.Random(KILLS), tmp_path / "killed", None
    for kill in range(KILLS):
        if run is None:
            resume = ["--resume"] if list(folder.glob("runs/*/config.yaml")) else []
            run = Run.start(folder, str(RECIPE), *SETTINGS, *resume)
        victim = kill_somebody(run, rng)
        print(f"{kill + 1}: killed {victim}", flush=True)
        if ended(run):
            code, text = run.finish()
            assert code != 0, text
            run = None
        for checkpoint in folder.glob("runs/*/checkpoints/step_*"):
            assert damage(checkpoint) is None
    if run is None:
        run = Run.start(folder, str(RECIPE), *SETTINGS, "--resume")
    code, text = run.finish()
    assert code == 0, text
    (killed,) = (folder / "runs").iterdir()
    assert sha256(killed / "export" / "model.safetensors") == sha256(alone.path / "export" / "model.safetensors")
    assert shared_memory() <= before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_saves_and_asks_to_be_started_again(tmp_path: Path, number: signal.Signals) -> None:
    run = Run.start(tmp_path / "work", str(RECIPE), "trainer.steps=1000", "evaluation.sets={}", *SMALL)
    run.wait_until(lambda: run.lines() >= 2)
    run.process.send_signal(number)
    code, text = run.finish(60)
    assert code == 75, text
    assert f"ended by {number.name} after step" in text
    (checkpoint,) = run.path.glob("checkpoints/step_*")
    saved = int(checkpoint.name.removeprefix("step_"))
    assert run.lines() == saved
    again = Run.start(tmp_path / "work", str(RECIPE), f"trainer.steps={saved + 1}", "evaluation.sets={}", *SMALL, "--resume")
    code, text = again.finish()
    assert code == 0, text
    assert again.lines() == saved + 1
