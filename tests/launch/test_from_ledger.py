"""What a run from a ledger takes of the run that made it, and what is refused before it starts."""

import errno
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch
from megatron_hpt.cli import app
from megatron_hpt.config import Config, DataConfig, EvaluationConfig, ModelConfig, RolloutConfig, TrainerConfig
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.launch import from_ledger, preflight, train
from megatron_hpt.launch.supervisor import Supervisor
from megatron_hpt.launch.train import resume_run, start_from_ledger
from megatron_hpt.overrides import load_yaml
from megatron_hpt.run import RunDir, create, newest

STEPS = 3


@pytest.fixture
def made(tmp_path: Path) -> RunDir:
    """A run with servers of its own and an evaluation, whose ledger is full."""
    config = Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        rollout=RolloutConfig(urls=["http://node7:8000"]),
        evaluation=EvaluationConfig(sets={"held": "h"}),
        trainer=TrainerConfig(steps=STEPS),
    )
    run = create(config, tmp_path / "theirs")
    for step in range(STEPS):
        Ledger(run.batches).write(Batch(step, [], metrics={"rollout/tokens": step}))
    return run


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What supervisors are told; they do nothing."""
    told: list[Config] = []
    monkeypatch.setattr(preflight, "check_without_engines", lambda config: None)
    monkeypatch.setattr(Supervisor, "run", lambda self: told.append(self._config))
    monkeypatch.setattr(train, "_report", lambda run: None)
    return told


def test_a_copy_has_the_batches_and_neither_engines_nor_evaluations(
    made: RunDir, tmp_path: Path, supervised: list[Config]
) -> None:
    run = start_from_ledger(str(made.path), ["optimizer.lr=1e-3", "model.dtype=bfloat16"], tmp_path)
    ours, theirs = Ledger(run.batches), Ledger(made.batches)
    assert ours.steps() == list(range(STEPS))
    assert all(ours.path(step).samefile(theirs.path(step)) for step in range(STEPS))
    config = load_yaml(run.config)
    assert (config.name, config.evaluation, config.optimizer.lr) == ("x-from-ledger", EvaluationConfig(), 1e-3)
    assert [(told.rollout.servers, told.rollout.urls) for told in supervised] == [(0, [])]
    assert run.is_from_ledger
    assert json.loads(run.ledger_source.read_text()) == {"run": str(made.path), "steps": STEPS}
    assert newest("x", made.path.parent).path == made.path
    with pytest.raises(ConfigError, match="no run of 'x'"):  # nor would it be continued in the other's place
        newest("x", tmp_path)


def test_a_copy_of_a_copy_keeps_its_name(made: RunDir, tmp_path: Path, supervised: list[Config]) -> None:
    first = start_from_ledger(str(made.path), [], tmp_path)
    second = start_from_ledger(str(first.path), ["trainer.steps=2"], tmp_path)
    assert load_yaml(second.config).name == "x-from-ledger"
    assert Ledger(second.batches).steps() == [0, 1]


def test_batches_are_copied_where_they_cannot_be_linked(
    made: RunDir, tmp_path: Path, supervised: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(from_ledger.os, "link", refuse)
    run = start_from_ledger(str(made.path), [], tmp_path)
    for step in range(STEPS):
        ours, theirs = Ledger(run.batches).path(step), Ledger(made.batches).path(step)
        assert not ours.samefile(theirs)
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "override",
    [
        *("model.path=other", "data.train=other", "reward.name=exact", "algorithm.name=grpo"),
        *("algorithm.gate.threshold=2", "algorithm.overlong.mask=true", "algorithm.discount=0.9"),
        *("rollout.temperature=0.5", "rollout.samples_per_prompt=4", "trainer.seed=1", "trainer.prompts_per_step=4"),
    ],
)
def test_what_the_batches_were_made_with_cannot_change(made: RunDir, tmp_path: Path, override: str) -> None:
    key = ".".join(override.partition("=")[0].split(".")[:2])
    with pytest.raises(ConfigError, match=rf"--from-ledger: {key} cannot change: the batches of .* were made with it"):
        start_from_ledger(str(made.path), [override], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_evaluation_that_nobody_makes_is_refused(made: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--from-ledger: evaluation: nothing is evaluated"):
        start_from_ledger(str(made.path), ["evaluation.every=5"], tmp_path)


def test_what_the_trainer_does_with_them_can(made: RunDir, tmp_path: Path, supervised: list[Config]) -> None:
    overrides = ["algorithm.clip.high=0.3", "algorithm.mismatch.correction=tis", "algorithm.old_policy=trainer"]
    overrides += ["trainer.updates_per_batch=2", "parallel.tensor=2", "actor.micro_batch_tokens=64", "name=mine"]
    assert load_yaml(start_from_ledger(str(made.path), overrides, tmp_path).config).name == "mine"


@pytest.mark.parametrize(
    ("gone", "error", "message"),
    [
        ((0, 1, 2), DataError, r"batches: no batch is there; --from-ledger trains the batches of a run that has made some"),
        ((1,), DataError, r"batches: the batch of step 1 is missing, and later ones are there"),
        ((2,), ConfigError, r"trainer\.steps: given 3; .* has 2 batches: trainer\.steps=2 trains these"),
    ],
)
def test_a_ledger_with_gaps_is_refused(
    made: RunDir, tmp_path: Path, gone: tuple[int, ...], error: type[Exception], message: str
) -> None:
    for step in gone:
        Ledger(made.batches).path(step).unlink()
    with pytest.raises(error, match=message):
        start_from_ledger(str(made.path), [], tmp_path / "ours")


def test_a_shorter_ledger_is_trained_where_that_is_asked_for(made: RunDir, tmp_path: Path, supervised: list[Config]) -> None:
    Ledger(made.batches).path(2).unlink()
    assert start_from_ledger(str(made.path), ["trainer.steps=2"], tmp_path).is_from_ledger


def test_a_copy_is_continued_without_engines_and_not_beyond_its_batches(
    made: RunDir, tmp_path: Path, supervised: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config) -> None:
        raise AssertionError("an engine was looked at")

    monkeypatch.setattr(preflight, "check", fail)
    monkeypatch.setattr(train, "check_extra_arguments", fail)
    run = start_from_ledger(str(made.path), [], tmp_path)
    resume_run(str(run.path), [], tmp_path)
    assert [told.rollout.servers for told in supervised] == [0, 0]
    with pytest.raises(ConfigError, match=r"trainer\.steps: given 5; .* has 3 batches"):
        resume_run(str(run.path), ["trainer.steps=5"], tmp_path)


def test_a_recipe_has_no_ledger_and_both_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.py: not a run directory"):
        start_from_ledger(str(tmp_path / "recipe.py"), [], tmp_path)
    refused = CliRunner().invoke(app, ["train", "--resume", "--from-ledger", str(tmp_path)])
    assert "give one of both" in str(refused.exception)
