"""Metrics on disk, and the live display."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.run import create
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.progress import Progress, duration


def line(step: int, **more) -> dict:
    return {
        "step": step,
        "rollout/accuracy": step / 10,
        "gate/sft_share": 1 - step / 10,
        "train/loss": 1.0,
        "time/step_s": 3.5,
        "throughput/tokens_per_s": 100.0,
        **more,
    }


@pytest.fixture
def run(tmp_path: Path):
    return create(Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t")), tmp_path)


def test_lines_are_appended_and_a_resumed_run_replaces_its_own(run) -> None:
    log = metrics.MetricsLog(run, 0)
    for step in range(3):
        log.write(line(step, bad=float("nan")))
    log.close()
    again = metrics.MetricsLog(run, 2)
    again.write(line(2, again=True))
    again.close()
    lines = metrics.read(run.metrics)
    assert [entry["step"] for entry in lines] == [0, 1, 2]
    assert lines[2]["again"] is True
    assert lines[0]["bad"] is None
    assert list(run.tensorboard.iterdir())


def test_a_line_being_written_is_left_out(run) -> None:
    run.metrics.write_text(json.dumps(line(0)) + "\n" + '{"step": 1, "roll')
    assert [entry["step"] for entry in metrics.read(run.metrics)] == [0]


def test_progress_shows_numbers_and_time_left() -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress(steps=10, start=0, console=console) as progress:
        progress.status("starting: engine 0 (1 s)")
        progress.status("starting: engine 0 (2 s)")
        progress.step(line(0, **{"eval/heldout/avg@8": 0.125}))
    text = console.file.getvalue()
    assert text.count("starting") == 1
    assert "step 1/10" in text
    assert "SFT share 1.00" in text
    assert "held-out 0.125" in text
    assert "time left 0:32" in text  # 9 steps of 3.5 s


@pytest.mark.parametrize(("taken", "shown"), [(0, "not taken"), (3, "1.0000")])
def test_a_step_of_several_updates_is_not_taken_if_none_of_them_is(taken: int, shown: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress(steps=10, start=0, console=console) as progress:
        progress.step(line(0, **{"train/updates": taken, "train/skipped": 4 - taken}))
    assert f"loss {shown}" in console.file.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
