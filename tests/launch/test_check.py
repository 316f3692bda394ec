"""``megatron-hpt check``, on the page that newcomers follow, as it is written."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_hpt import recipe
from megatron_hpt.errors import ConfigError
from megatron_hpt.examples import tiny_llama
from megatron_hpt.launch import check
from tests import programs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def python(name: str) -> str:
    """A file of the page."""
    (found,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a newcomer is before `check`: by the page's own files and commands."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(python("mine.py"), encoding="utf-8")
    (folder / "questions.py").write_text(python("questions.py"), encoding="utf-8")
    programs._done(lambda: exec(compile(python("questions.py"), "questions.py", "exec"), {}), [], folder)
    tiny_llama.write(folder / "model")
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[1].endswith("prepare_data.py"):
            done = programs.tool("prepare_data.py", *words[2:], cwd=folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is not asked, which takes half a minute."""
    monkeypatch.setattr(check, "check_engine_arguments", lambda config: None)


def checked(folder: Path, *overrides: str):
    return programs.megatron_hpt("check", "mine.py", *overrides, cwd=folder)


@pytest.mark.slow
def test_the_page_is_true(folder: Path, unasked: None) -> None:
    done = checked(folder)
    assert done.returncode == 0, done.stderr
    for said in (
        "data/train.parquet: 600 rows, 600 with a demonstration",
        "prompt 6 of 8 tokens, demonstration 16 of 24",
        "32 prompts × 8 rollouts",
        "20 steps, 1.07 times through the data",
        "64 of 64 demonstrations earn 1",
        "nothing stands in the way of megatron-hpt train mine.py",
    ):
        assert said in done.stdout
    assert not (folder / "runs").exists()


@pytest.mark.slow
def test_demonstrations_that_the_reward_does_not_read_are_counted(folder: Path, unasked: None) -> None:
    assert "note: 64 demonstrations do not earn the reward" in checked(folder, "reward.name=choice").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_response_length=4", "none of the 600 prompts looked at has a demonstration of at most"),
        ("data.max_response_length=100000", "positions"),
        ("data.train=nowhere.parquet", "nowhere.parquet"),
        ("data.train=", "data.train: names no file"),
        ("model.path=nowhere", "nowhere"),
        ("parallel.tensor=3", "parallel.tensor: given 3"),
        ("rollout.python=/nowhere/python", "no Python interpreter at /nowhere/python"),
    ],
)
def test_what_train_would_refuse_is_refused(folder: Path, unasked: None, override: str, message: str) -> None:
    done = checked(folder, override)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_the_engine_takes_what_the_page_makes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute for an answer that every start of an engine gives too."""
    monkeypatch.chdir(folder)
    check.check_engine_arguments(recipe.load("mine.py", []).config)


@pytest.mark.slow
def test_the_engine_is_asked_what_it_thinks_of_its_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    config = recipe.load("mine.py", []).config
    with pytest.raises(ConfigError, match=r"(?s)vllm refuses its arguments:\n  \S*Error.*max_model_len \(1000024\) is greater"):
        check.check_engine_arguments(
            config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_length": 10**6})})
        )
