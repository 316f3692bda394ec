"""A whole run whose engine sleeps while the trainer works, and dies once: on a host memory stays, the order is that of GPUs."""

import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .runs import RECIPE, ROOT, SMALL, STARTED, Run
from .test_training import metrics

pytestmark = pytest.mark.slow
STEPS = 4
SETTINGS = (
    f"trainer.steps={STEPS}",
    "rollout.sleep=true",
    "actor.offload=all",
    "evaluation.every=2",
    "evaluation.samples=1",
    *SMALL,
)
SAID = re.compile(r"(fall asleep|wake up tags \['\w+'\])\.$")
ASLEEP, WEIGHTS, CACHE = "fall asleep", "wake up tags ['weights']", "wake up tags ['kv_cache']"


def test_an_engine_sleeps_through_every_step_and_comes_back_from_the_dead(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "end_to_end" / "sleeping.py"), "train", str(RECIPE), *SETTINGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = Run(tmp_path, subprocess.Popen(command, cwd=tmp_path, **pipes))
    STARTED.append(run)
    run.wait_until(lambda: run.lines() >= 2)
    core = run.find("engine core")
    core.suspend()  # calls wait for it when it dies: the server listens no more, and does not end
    time.sleep(3)
    core.kill()
    code, text = run.finish()
    assert code == 0, text
    assert "engine 0 listens no more and is ended" in text
    assert "and is started again when the trainer's GPUs are free; restart 1 of 3" in text
    lines = metrics(run.path)
    assert [line["weights/version"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["eval/version"] == STEPS
    assert (run.path / "export" / "model.safetensors").is_file()
    log = (run.path / "logs" / "engine_0.log").read_text().splitlines()
    said = [match[1] for line in log if (match := SAID.search(line))]
    assert said[0] == said[-1] == ASLEEP  # before the trainer loads its model, and for the export
    assert said.count(ASLEEP) > STEPS
    # The second server starts awake: it may be given weights before it first sleeps.
    assert {(last, now) for last, now in itertools.pairwise(said) if now != ASLEEP} == {(ASLEEP, WEIGHTS), (WEIGHTS, CACHE)}
