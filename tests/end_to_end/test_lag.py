"""Runs whose engines sample ahead of the trainer (`rollout.max_lag`)."""

import itertools
from pathlib import Path

import pytest

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Source

from .conftest import OnShared
from .runs import SMALL, Run
from .test_training import HELD_OUT, metrics, sha256

pytestmark = pytest.mark.slow
STEPS, LAG = 9, 1
EVALUATION = f"evaluation={{sets: {{heldout: {HELD_OUT}}}, every: 4, samples: 1}}"
SETTINGS = (
    *(f"trainer.steps={STEPS}", f"rollout.max_lag={LAG}", "trainer.save_every=2", "algorithm.name=grpo", EVALUATION),
    *("parallel.tensor=1", *SMALL),
)


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.thorough)])
def test_a_run_that_samples_ahead_survives_kills_and_its_ledger_makes_it_again(
    on_shared: OnShared, tmp_path: Path, kind: str
) -> None:
    """In test-all alone: SGLang, of which tests/transfer/test_in_flight.py proves that it names the versions of tokens."""
    run = on_shared.start(tmp_path / "killed", *SETTINGS, kind=kind)
    for victim, lines in (("coordinator", 3), ("trainer rank 0", 5)):
        run.wait_until(lambda run=run, lines=lines: run.lines() >= lines)
        run.find(victim).kill()
        code, text = run.finish()
        assert code == 1
        assert f"{victim} died (exit code -9, SIGKILL)" in text
        run = on_shared.start(tmp_path / "killed", *SETTINGS, "--resume", kind=kind)
    code, text = run.finish()
    assert code == 0, text
    (made,) = (config.parent for config in run.folder.glob("runs/*/config.yaml"))
    assert_lags_are_bounded(made)
    replay = Run.start(run.folder, str(made), "--from-ledger", "rollout.python=/nowhere/python")  # no engine is started
    code, text = replay.finish()
    assert code == 0, text
    again, first = (sha256(path / "export" / "model.safetensors") for path in (replay.path, made))
    assert again == first


def assert_lags_are_bounded(run: Path) -> None:
    """Every token is of weights that are old enough to exist and new enough to be trained; some are older than the newest."""
    lines, ledger = metrics(run), Ledger(run / "batches")
    assert [line["step"] for line in lines] == list(range(STEPS))
    ahead = 0
    for step in range(STEPS):
        spans = [span for row in ledger.read(step).rows if row.source is Source.ROLLOUT for span in row.versions]
        assert {version for version, _ in spans} <= set(range(max(0, step - LAG), step + 1))
        tokens, lagging = (sum(length for version, length in spans if step - version >= least) for least in (0, 1))
        assert lines[step]["rollout/lag_1_share"] == pytest.approx(lagging / tokens)
        assert lines[step]["rollout/lag_max"] == step - min(version for version, _ in spans)
        ahead += lagging
    assert ahead
    assert all(line["time/trainer_idle_s"] >= 0 and line["time/engines_idle_s"] >= 0 for line in lines)
    assert [(line["step"], line["eval/version"]) for line in lines if "eval/version" in line] == [(0, 0), (5, 4), (8, STEPS)]
    assert all(before["data/next_prompt"] < after["data/next_prompt"] for before, after in itertools.pairwise(lines))
