"""A run that is killed again and again, anywhere, ends with the weights of a run that was left alone, bit for bit."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_hpt.data.checkpoints import damage

from .runs import RECIPE, SMALL, Run, gone, shared_memory
from .test_training import sha256

pytestmark = pytest.mark.end_to_end
KILLS = int(os.environ.get("HPT_KILLS", "2"))
"""20 were run for docs/resume.md; each costs a restart."""
STEPS = 10
SETTINGS = (f"trainer.steps={STEPS}", "trainer.save_every=2", "evaluation.sets={}", *SMALL)


def kill_somebody(run: Run, rng: random.Random) -> str:
    """Kill a random process of the run at a random moment; returns its command."""
    time.sleep(rng.uniform(0, 12))
    if run.process.poll() is not None:
        return "(the run had ended)"
    victims = [psutil.Process(run.process.pid), *run.processes()]
    victim = rng.choice(victims)
    command = " ".join(victim.cmdline())[:120]
    victim.kill()
    return command


@pytest.mark.timeout(240 + 150 * KILLS)
def test_random_kills_do_not_change_the_weights(tmp_path: Path) -> None:
    alone = Run.start(tmp_path / "alone", str(RECIPE), *SETTINGS)
    code, text = alone.finish()
    assert code == 0, text
    before, rng, resume = shared_memory(), random.Random(KILLS), []
    for _ in range(KILLS):
        run = Run.start(tmp_path / "killed", str(RECIPE), *SETTINGS, *resume)
        run.wait_until(lambda run=run: list((run.folder / "runs").glob("*/batches/*.arrow")) or run.process.poll() is not None)
        processes = run.processes()
        victim = kill_somebody(run, rng)
        code, text = run.finish()
        assert gone(processes) == []
        print(f"killed {victim}: exit code {code}, {run.lines()} lines")
        for checkpoint in run.path.glob("checkpoints/step_*"):
            assert damage(checkpoint) is None
        if code == 0:
            break
        resume = ["--resume"]
    if code != 0:
        code, text = Run.start(tmp_path / "killed", str(RECIPE), *SETTINGS, "--resume").finish()
        assert code == 0, text
    assert shared_memory() <= before
    (killed,) = (tmp_path / "killed" / "runs").iterdir()
    assert sha256(killed / "export" / "model.safetensors") == sha256(alone.path / "export" / "model.safetensors")
    shutil.rmtree(killed / "checkpoints")


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
