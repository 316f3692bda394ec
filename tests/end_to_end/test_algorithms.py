"""Algorithms end to end: groups with a demonstration, dynamic sampling, a row of one's own, steps not taken, the comparison."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Source
from tests.programs import tool

from .conftest import OnShared
from .runs import RECIPE, SMALL

pytestmark = pytest.mark.slow
FAST = ("evaluation.sets={}", "trainer.export=false", "parallel.tensor=1", *SMALL)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def finished(on_shared: OnShared) -> Callable[..., Path]:
    """Runs to the end, and returns the run's directory."""

    def finish(folder: Path, *arguments: str) -> Path:
        run = on_shared.start(folder, *FAST, *arguments)
        code, text = run.finish()
        assert code == 0, text
        return run.path

    return finish


def test_dynamic_sampling_asks_for_more_prompts_and_an_empty_batch_trains_nothing(finished, tmp_path: Path) -> None:
    """The untrained model solves nothing, so no prompt is informative."""
    run = finished(tmp_path / "work", "algorithm.name=dapo", "trainer.steps=2", "algorithm.max_rounds=2")
    lines = metrics(run)
    assert [line["data/next_prompt"] for line in lines] == [16, 32]
    for line in lines:
        assert (line["gate/prompts"], line["gate/skipped_share"]) == (16, 1.0)
        assert line["train/skip_reason"] == "nothing to train"
        assert line["train/grad_norm"] == 0.0
    asked = [d["prompt_id"] for step in (0, 1) for d in Ledger(run / "batches").read(step).decisions]
    assert len(set(asked)) == 32  # no prompt twice within an epoch


OWN = '''
from dataclasses import replace

from megatron_hpt.objective.algorithms import luffy
from megatron_hpt.objective.shaping import Saturating


def sharper(s):
    """LUFFY with another shaping of its demonstrations."""
    rollouts, demonstrations = luffy(s).terms
    return replace(luffy(s), terms=(rollouts, replace(demonstrations, shaping=Saturating(0.5))))
'''


def test_an_algorithm_from_outside_the_package_trains(finished, tmp_path: Path) -> None:
    """A demonstration in every group, and a correction of the mismatch, as LUFFY's: what it is made of."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "own_algorithm.py").write_text(OWN)
    settings = ("algorithm.name=own_algorithm:sharper", "trainer.steps=2", "algorithm.mismatch.correction=icepop")
    run = finished(work, *settings)
    for line in metrics(run):
        assert line["gate/both_share"] == 1.0
        assert not line["train/skipped"]
        assert line["train/loss_off_policy"] != 0
        assert line["mismatch/dropped_share"] == 0.0  # engine and trainer agree
    rows = Ledger(run / "batches").read(1).rows
    for group in range(8):
        sources = [row.source for row in rows if row.group == group]
        assert sources == [Source.ROLLOUT] * 3 + [Source.DEMONSTRATION]  # n = 4
    assert all(row.reward == 1.0 for row in rows if row.source is Source.DEMONSTRATION)  # graded, not assumed


def test_batches_of_steps_not_taken_are_kept_and_the_run_stops(on_shared: OnShared, tmp_path: Path) -> None:
    arguments = ("optimizer.skip_above=1e-9", "optimizer.stop_after_skipped=2", "trainer.steps=9")
    run = on_shared.start(tmp_path / "work", *FAST, *arguments)
    code, text = run.finish()
    assert code == 1
    assert "2 steps in a row were not taken (optimizer.stop_after_skipped)" in text
    assert "is above optimizer.skip_above=1e-09" in text
    kept = sorted(path.name for path in (run.path / "skipped").iterdir())
    assert kept == ["step_000000.arrow", "step_000000.json", "step_000001.arrow", "step_000001.json"]
    assert Ledger(run.path / "skipped").read(0) == Ledger(run.path / "batches").read(0)
    assert json.loads((run.path / "skipped" / "step_000001.json").read_text())["train/grad_norm"] > 0


def test_algorithms_are_compared_from_one_start_and_the_comparison_continues(on_shared: OnShared, tmp_path: Path) -> None:
    settings = ("trainer.steps=2", "parallel.tensor=1", *SMALL, *on_shared.settings(tmp_path))
    options = ("--algorithms", "sft,hpt", "--seeds", "0", "--start-steps", "2", "--out", "compared")
    compare = partial(tool, "compare_algorithms.py", RECIPE, *settings, *options, cwd=tmp_path)
    done = compare()
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "compared" / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["sft", "hpt"]
    assert (tmp_path / "compared" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert numbers["sft"][0]["generated"] == 0
    assert numbers["hpt"][0]["generated"] > 0
    runs = sorted((tmp_path / "compared").glob("*/metrics.jsonl"))
    times = {path: path.stat().st_mtime_ns for path in runs}
    again = compare()
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in runs} == times
    other = compare("trainer.seed=7")
    assert other.returncode == 1
    assert "has other settings than asked for" in other.stderr
