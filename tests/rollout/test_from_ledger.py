"""The coordinator of a run from a ledger, beside a trainer of a few lines."""

import threading
from pathlib import Path

import pytest

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch
from megatron_hpt.blackboard import Blackboard
from megatron_hpt.config import Config, DataConfig, DeadlinesConfig, ModelConfig, TrainerConfig
from megatron_hpt.errors import DeadlineError
from megatron_hpt.rollout.from_ledger import coordinate
from megatron_hpt.run import RunDir, create
from megatron_hpt.telemetry.metrics import read

STEPS = 3
DECIDED = {"gate/sft_share": 0.5, "rollout/policy_version": 0, "time/rollout_s": 7.0}
EVALUATED = {"eval/held/avg@8": 0.5, "eval/version": 0, "time/eval_s": 3.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="is not there"),
        trainer=TrainerConfig(steps=STEPS),
        deadlines=DeadlinesConfig(step_s=5.0),
    )
    run = create(config, tmp_path)
    for step in range(STEPS):
        Ledger(run.batches).write(Batch(step, [], metrics=DECIDED | (EVALUATED if step == 0 else {})))
    return run


def train(board: Blackboard, first: int, last: int) -> None:
    board.put(f"published/{first}", {"weights/bytes": 0})
    for step in range(first, last):
        board.wait(f"batch/{step}", 5, "the coordinator")
        board.put(f"trained/{step}", {"train/tokens": 10, "train/loss": float(step)})
        board.put(f"published/{step + 1}", {"weights/bytes": 0})


@pytest.mark.parametrize("start", [0, 2])
def test_every_batch_is_trained_and_has_its_line(run: RunDir, start: int) -> None:
    board = Blackboard.host()
    trainer = threading.Thread(target=train, args=(Blackboard.join(board.address), start, STEPS))
    trainer.start()
    coordinate(run, board, start)
    trainer.join()
    assert board.get("ready/coordinator")
    assert board.get("evaluated")
    lines = read(run.metrics)
    assert [line["step"] for line in lines] == list(range(start, STEPS))
    assert [line["weights/version"] for line in lines] == list(range(start + 1, STEPS + 1))
    for line in lines:
        assert line.items() >= {**DECIDED, "train/loss": float(line["step"])}.items()
        assert not [key for key in line if key.startswith("eval/") or key == "time/eval_s"]
        assert line["throughput/tokens_per_s"] == pytest.approx(10 / line["time/step_s"])


@pytest.mark.slow
def test_a_trainer_that_is_late_ends_it(run: RunDir) -> None:
    board = Blackboard.host()
    trainer = threading.Thread(target=train, args=(Blackboard.join(board.address), 0, 1))
    trainer.start()
    with pytest.raises(DeadlineError, match="the trainer is late: 'trained/1'"):
        coordinate(run, board, 0)
    trainer.join()
    assert len(read(run.metrics)) == 1
