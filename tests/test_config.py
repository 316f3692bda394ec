"""The configuration tree: overrides, errors, and reading back what was saved."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt import recipe
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.overrides import apply_overrides, dump_yaml, load_yaml, validated
from megatron_hpt.settings.user_functions import import_function

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "recipes" / "quickstart.py")


@pytest.fixture
def config() -> Config:
    return recipe.load(QUICKSTART, []).config


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = recipe.load(str(path), []).config
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(tmp_path / "config.yaml") == config
    assert recipe.load(str(tmp_path), []).config == config  # a run directory


def test_overrides_are_typed(config: Config) -> None:
    changed = apply_overrides(
        config,
        [
            "trainer.steps=20",
            "optimizer.lr=1e-3",
            "optimizer.betas=[0.9, 0.99]",
            "evaluation.sets={a: b.parquet}",
            "trainer.export=false",
        ],
    )
    assert (changed.trainer.steps, changed.optimizer.lr, changed.optimizer.betas) == (20, 1e-3, (0.9, 0.99))
    assert changed.evaluation.sets == {"a": "b.parquet"}
    assert changed.trainer.export is False
    assert config.trainer.steps != 20


@pytest.mark.parametrize(
    "train", ["a.parquet", "[a.parquet, s3://b/*.parquet]", "[{path: a, weight: 2}, {path: [b, c], weight: 0.5}]"]
)
def test_training_data_is_named_in_three_forms(config: Config, train: str) -> None:
    changed = apply_overrides(config, [f"data.train={train}", "evaluation.sets.more=[x, y]"])
    assert validated(yaml.safe_load(dump_yaml(changed)), "saved") == changed
    assert changed.model_dump(mode="json")["data"]["train"] == yaml.safe_load(train)
    assert changed.evaluation.sets["more"] == ["x", "y"]


def test_overrides_of_the_model_are_its_own_keys(config: Config) -> None:
    changed = apply_overrides(config, ["model.overrides.rope_theta=40000", "model.overrides.rope_scaling={factor: 2.0}"])
    assert changed.model.overrides == {"rope_theta": 40000, "rope_scaling": {"factor": 2.0}}
    assert apply_overrides(changed, ["model.overrides={sliding_window: null}"]).model.overrides == {"sliding_window": None}
    assert config.model.overrides == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), JSON, max_size=4))
def test_overrides_of_the_model_are_saved_as_given(overrides: dict) -> None:
    config = Config(name="x", model=ModelConfig(path="m", overrides=overrides), data=DataConfig(train="t"))
    saved = validated(yaml.safe_load(dump_yaml(config)), "saved")
    assert saved.model.overrides == overrides
    assert repr(saved.model.overrides) == repr(overrides)  # 1 stays 1, not 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepz=3", r"trainer\.stepz: unknown key; trainer has: steps, .*did you mean trainer\.steps\?"),
        ("trainers.steps=3", r"trainers\.steps: unknown key; the configuration has: name, model, .*did you mean trainer"),
        ("trainer.steps.x=3", r"trainer\.steps\.x: unknown key; trainer\.steps has: nothing \(it is a plain value\)"),
        ("trainer.steps=many", r"trainer\.steps: given 'many'; input should be a valid integer"),
        ("trainer.steps=0", r"trainer\.steps: given 0; input should be greater than 0"),
        ("model.dtype=float8", r"model\.dtype: given 'float8'; input should be 'float32' or 'bfloat16'"),
        ("trainer.steps", r"override 'trainer\.steps': expected section\.key=value"),
        (
            "model.override.rope_theta=1",
            r"model\.override\.rope_theta: unknown key; model has: .*did you mean model\.overrides\?",
        ),
        ("model.overrides.rope_scaling.factor=2", r"rope_scaling has: nothing \(it is a plain value\)"),
        ("data.train=[]", r"data\.train: given \[\]; list should have at least 1 item"),
        ("data.train=[5]", r"data\.train\.0: given 5; input should be a valid string"),
        ("data.train=[{path: a}]", r"data\.train\.0\.weight: missing"),
        ("data.train=[{path: a, weight: 0}]", r"data\.train\.0\.weight: given 0; input should be greater than 0"),
        ("data.train=[{path: a, wait: 3}]", r"train\.0\.wait: unknown key; .* has: path, weight; did you mean .*\.weight\?"),
        ("data.curriculum.keep_solved=2", r"data\.curriculum\.keep_solved: given 2; input should be less than or equal to 1"),
        ("evaluation.sets.a.b=c", r"evaluation\.sets\.a has: nothing"),
        ("trainer.steps=[", r"trainer\.steps: '\[' is not a YAML value"),
        ("trainer.updates_per_batch=65", r"updates_per_batch 65: a batch has 64 prompts \(prompts_per_step\)"),
        ("trainer={updates_per_batch: 0}", r"trainer\.updates_per_batch: given 0; input should be greater than 0"),
    ],
)
def test_a_wrong_override_is_explained(config: Config, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, [override])


@pytest.mark.parametrize("several", ["updates_per_batch", "epochs_per_batch"])
def test_a_correction_between_updates_needs_the_trainers_old_policy(config: Config, several: str) -> None:
    settings = [f"trainer.{several}=2", "algorithm.mismatch.correction=tis"]
    with pytest.raises(ConfigError, match=rf"\.correction: given tis; .*{several}=2.* only algorithm\.old_policy=trainer"):
        apply_overrides(config, settings)
    apply_overrides(config, [*settings, "algorithm.old_policy=trainer"])
    apply_overrides(config, settings[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"defines no function recipe\(\)"),
        ("def recipe(): return 3", r"recipe\(\) returned int; it must return megatron_hpt\.config\.Config"),
        ("import nothing_of_this_name", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        recipe.load(str(tmp_path / "r.py"), [])


ARGUMENTS = """
from typing import Literal
from megatron_hpt.config import Config, DataConfig, ModelConfig, TrainerConfig

def recipe(size: Literal["7B", "1.5B"] = "7B", steps: int = 3) -> Config:
    trainer = TrainerConfig(steps=steps)
    return Config(name=f"m-{size}", model=ModelConfig(path=size), data=DataConfig(train="t"), trainer=trainer)
"""


def test_arguments_of_a_recipe_stand_among_the_settings(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(ARGUMENTS)
    loaded = recipe.load(str(tmp_path / "r.py"), ["size=1.5B", "trainer.seed=7", "steps=4"])
    assert (loaded.config.name, loaded.config.trainer.steps, loaded.config.trainer.seed) == ("m-1.5B", 4, 7)
    assert loaded.overrides == ["trainer.seed=7"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("size=8B", r"r\.py: recipe: not valid\n  size: given '8B'; input should be '7B' or '1\.5B'"),
        ("steps=many", r"steps: given 'many'; input should be a valid integer"),
        ("steps=0", r"TrainerConfig: not valid\n  steps: given 0; input should be greater than 0"),
        ("sice=7B", r"'sice=7B': .*r\.py has the arguments size, steps; .*; did you mean 'size'"),
        ("trainr.steps=3", r"trainr\.steps: unknown key"),
    ],
)
def test_a_wrong_argument_names_those_there_are(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "r.py").write_text(ARGUMENTS)
    with pytest.raises(ConfigError, match=message):
        recipe.load(str(tmp_path / "r.py"), [given])


def test_an_argument_cannot_hide_a_section(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def recipe(model: str = ''): pass")
    with pytest.raises(ConfigError, match=r"recipe\(model\): a section has that name"):
        recipe.load(str(tmp_path / "r.py"), [])


def test_no_such_recipe_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe"):
        recipe.load(str(tmp_path / "none.py"), [])
    (tmp_path / "r.txt").write_text("")
    with pytest.raises(ConfigError, match=r"a recipe is a \.py file"):
        recipe.load(str(tmp_path / "r.txt"), [])
    (tmp_path / "config.yaml").write_text("name: x\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: .*\n.*model: missing"):
        recipe.load(str(tmp_path), [])


def test_configuration_and_pure_parts_import_no_torch() -> None:
    names = (
        "config",
        "recipe",
        "models.hf_config",
        "transfer.manifest",
        "batch.rows",
        "objective.gate",
        "engines.registry",
        "doctor.doctor",
    )
    modules = ", ".join(f"megatron_hpt.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_users_file_may_have_dataclasses_with_annotations_as_text(tmp_path: Path) -> None:
    kept = "from dataclasses import dataclass\n\n@dataclass\nclass Kept:\n    number: int = 3\n"
    reward = "\ndef reward(response, truth):\n    return float(Kept().number)\n"
    (tmp_path / "of_a_user.py").write_text("from __future__ import annotations\n" + kept + reward)
    assert import_function(f"{tmp_path}/of_a_user.py:reward", "reward.name")("", "") == 3.0


@given(steps=st.integers(1, 40), every=st.integers(0, 12), lag=st.integers(0, 5), version=st.integers(0, 50))
def test_which_versions_are_evaluated(steps: int, every: int, lag: int, version: int) -> None:
    """The first, and every k-th that some batch before the last one waits for; never twice what the last line has."""
    small = Config(
        name="x",
        model=ModelConfig(path="m"),
        data=DataConfig(train="t"),
        rollout={"max_lag": lag},
        evaluation={"sets": {"heldout": "h"}, "every": every},
        trainer={"steps": steps},
    )
    due = every and version % every == 0 and version + lag < steps - 1
    assert small.evaluates(version) == (version == 0 or bool(due))
    small.evaluation.sets = {}
    assert not small.evaluates(version)


def test_engines_that_sleep_take_turns_with_the_trainer(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"max_lag 1: with sleep .* it must be 0"):
        apply_overrides(config, ["rollout.sleep=true", "rollout.max_lag=1"])
