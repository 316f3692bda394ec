"""The best checkpoint is chosen by a validation set, and stays."""

import json
from pathlib import Path

import pytest

from megatron_hpt.config import EvaluationConfig
from megatron_hpt.errors import CheckpointError, ConfigError
from megatron_hpt.evaluation.selection import Selection, check_selection, remove_superseded
from megatron_hpt.models.checkpoints import Best, read_best, superseded
from megatron_hpt.overrides import validated
from megatron_hpt.run import RunDir

CONFIG = EvaluationConfig(sets={"aime24": "a.parquet"}, validation={"mine": "b.parquet"}, select="mine", samples=4)


def evaluated(version: int, mine: float | None, aime: float = 0.0) -> dict:
    return {"eval/version": version, "eval/mine/avg@4": mine, "eval/aime24/avg@4": aime}


def run_with(folder: Path, *steps: int) -> RunDir:
    run = RunDir(folder)
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
    return run


def test_the_highest_validation_accuracy_chooses_and_the_earliest_of_equals(tmp_path: Path) -> None:
    selection = Selection(run := run_with(tmp_path), CONFIG, [])
    for metrics in (evaluated(0, 0.9), {"step": 1}, evaluated(10, 0.2), evaluated(20, 0.4, aime=0.1)):
        selection.consider(metrics)
    selection.consider(evaluated(30, 0.4, aime=0.9))  # the reported set has no say
    selection.consider(evaluated(40, None))
    assert read_best(run.path) == Best(20, "mine", "eval/mine/avg@4", 0.4)
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "checkpoints/step_000020"


def test_a_resumed_run_has_it_again_among_the_checkpoints_that_are_left(tmp_path: Path) -> None:
    run = run_with(tmp_path, 10, 30)
    Selection(run, CONFIG, [evaluated(10, 0.3), evaluated(20, 0.9), evaluated(30, 0.2)])
    assert read_best(run.path).step == 10
    Selection(run, CONFIG, [])
    assert read_best(run.path) is None


def test_without_a_choice_nothing_is_chosen(tmp_path: Path) -> None:
    Selection(run := run_with(tmp_path, 10), EvaluationConfig(sets={"mine": "b"}, samples=4), [evaluated(10, 0.5)])
    assert read_best(run.path) is None


def test_the_best_checkpoint_stays() -> None:
    assert superseded([10, 20, 30, 40], 2, 0, Best(10, "mine", "m", 0.5)) == [20]
    assert superseded([10, 20, 30, 40], 2, 20, Best(10, "mine", "m", 0.5)) == []
    assert superseded([10, 20, 30, 40], 2, 0) == [10, 20]


def test_samples_of_old_evaluations_go(tmp_path: Path) -> None:
    run = run_with(tmp_path, 10)
    Selection(run, CONFIG, [evaluated(10, 0.5)])
    for step in (0, 10, 20, 30):
        run.evaluation(step).mkdir(parents=True)
    remove_superseded(run, 1)
    assert run.evaluation_steps() == [10, 30]


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"best\.json: does not name a checkpoint"):
        read_best(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sets": {"a": "a"}, "select": "a"}, "select=a is a reported set"),
        ({"validation": {"mine": "m"}, "select": "mein"}, r"select=mein is no set of validation \(mine\); did you mean 'mine'"),
        ({"sets": {"a": "a"}, "validation": {"a": "b"}}, "a is in sets and in validation"),
        ({"sets": {"a": "a"}, "validation": {"b": "a"}}, "b is in sets and in validation"),
    ],
)
def test_a_reported_set_cannot_choose(section: dict, message: str) -> None:
    tree = {"name": "x", "model": {"path": "m"}, "data": {"train": "t"}, "evaluation": section}
    with pytest.raises(ConfigError, match=message):
        validated(tree, "recipe")


@pytest.mark.parametrize(
    ("validation", "every", "save_every", "message"),
    [
        ({"mine": "m.parquet"}, 10, 4, "must be a multiple of trainer.save_every"),
        ({"mine": "m.parquet"}, 0, 4, "neither may be 0"),
        ({"mine": "m.parquet"}, 4, 0, "neither may be 0"),
        ({"mine": "data/MATH_500.parquet"}, 4, 2, "math-500 is a test set"),
        ({"mine": "t.parquet"}, 4, 2, r"t\.parquet is in data\.train"),
    ],
)
def test_a_choice_needs_checkpoints_and_problems_of_its_own(
    validation: dict, every: int, save_every: int, message: str
) -> None:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "data": {"train": "t.parquet"},
        "evaluation": {"validation": validation, "select": "mine", "every": every},
        "trainer": {"save_every": save_every},
    }
    with pytest.raises(ConfigError, match=message):
        check_selection(validated(tree, "recipe"))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("data", "data/own.parquet", r"own\.parquet is in data\.train"),
        ("data/o*.parquet", "data", r"own\.parquet is in data\.train"),
        ("own.jsonl", "sets", "aime24 is a test set"),
    ],
)
def test_folders_and_patterns_hide_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, validation: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("data/own.parquet", "sets/AIME_2024.parquet", "own.jsonl"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    tree = {"data": {"train": train}, "evaluation": {"validation": {"mine": validation}, "select": "mine", "every": 2}}
    config = validated({"name": "x", "model": {"path": "m"}, **tree, "trainer": {"save_every": 2}}, "recipe")
    with pytest.raises(ConfigError, match=message):
        check_selection(config)
