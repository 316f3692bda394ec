"""Rewards that need no mathematics, and how one is chosen."""

import asyncio
import json
from pathlib import Path

import pytest

from megatron_hpt.config import REWARDS, Config, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.overrides import apply_overrides, validated
from megatron_hpt.rewards import answers, gym, registry
from megatron_hpt.rewards.grades import Answer, Cause, Grade, Ungradable, graded, ungraded
from megatron_hpt.rewards.pool import GraderPool, weighted

HEDGES = (
    *("A (or B)", "A, possibly B", "A\\lor B", "A. B", "A: B", "A\\ B", "A vs B", "A>B", "A=B", "A或B", "A，B", "A is wrong"),
    *("A is incorrect; B", "A or E", "A, all", "A^c", "A gas", "A|B", "AB", "A; B; C; D"),
)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("\\boxed{B. 5 km}", "B"),
        ("\\boxed{b}", None),  # options inside the question are often lettered a to d
        ("\\boxed{Both}", None),
        ("The answer is (C).", "C"),
        ("**Answer: D**", "D"),
        ("Answer: A careful look shows", None),
        ("<think>the answer is A.</think> I choose nothing", None),
        ("answer: A. No, the answer is B.", "B"),
        ("\\boxed{\\text{Option B}}", "B"),
        ("\\boxed{x^2} fits best.\n\n**Answer: D**", "D"),  # a box with mathematics, then the letter
        ("<think>\\boxed{A}</think> The answer is B.", "B"),
        ("<think>\\boxed{A}", None),
        ("The answer is $\\textbf{(C)}$.", "C"),
        ("\\boxed{B. A or C}", None),
        ("\\boxed{\\textbf{(D) } 12}", "D"),
        ("Answer: A) 5", "A"),
        ("\\boxed{A or B}", None),
        ("\\boxed{A, B}", None),
        ("\\boxed{A/B}", None),
        ("\\boxed{(A)(B)}", None),
        ("\\boxed{\\text{A},\\text{B}}", None),
        ("Answer: A or B", None),
        ("Answer: A. Or B.", None),
        ("\\boxed{A} or \\boxed{B}", None),
        *((f"\\boxed{{{hedge}}}", None) for hedge in HEDGES),
    ],
)
def test_the_letter_that_is_chosen(response: str, letter: str | None) -> None:
    scores = {truth: answers.choice(Answer(response, truth)) for truth in "ABCD"}
    assert scores == {truth: float(truth == letter) for truth in "ABCD"}


def test_a_ground_truth_that_is_no_letter_is_not_a_wrong_answer() -> None:
    with pytest.raises(Ungradable, match="not a letter"):
        answers.choice(Answer("\\boxed{B}", "7"))


@pytest.mark.parametrize(
    ("name", "response", "truth", "reward"),
    [
        ("exact", "<think>no</think> Paris ", "Paris", 1.0),
        ("exact", "\\boxed{new  york}", "new york", 1.0),
        ("exact", "paris", "Paris", 0.0),
        ("numeric", "it is 1,234.50 dollars", "#### 1234.5", 1.0),
        ("numeric", "\\boxed{3.14}", "3.1401", 0.0),
        ("numeric", "3 of them", "3.000001", 1.0),
        ("numeric", "none", "3", 0.0),
        ("numeric", "\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("numeric", "\\boxed{\\frac{7}{2}}", "\\frac{1}{2}", 0.0),
        ("numeric", "\\boxed{x^2}", "2", 0.0),
        *(("numeric", f"\\boxed{{{text}}}", "6", 0.0) for text in ("5 or 6", "not 6", "x/6", "6x", "(5,6)", "5:6", "\\foo{6}")),
        ("numeric", "\\boxed{x = 6 \\text{ km}}", "6", 1.0),
        ("exact", "", "", 0.0),
        ("numeric", "<think>\\boxed{3}", "3", 0.0),
        ("numeric", "1e999", "3", 0.0),
        ("format", "so \\boxed{7}", "", 1.0),
        ("format", "so 7", "", 0.0),
    ],
)
def test_simple_rewards(name: str, response: str, truth: str, reward: float) -> None:
    assert registry.build(name, RewardConfig())(Answer(response, truth)) == reward


def test_a_task_of_reasoning_gym_is_scored_by_its_own_verifier() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("countdown", size=1, seed=3)[0]
    score = gym.build(RewardConfig())
    solution = entry["metadata"]["expression"]
    assert score(Answer(f"\\boxed{{{solution}}}", json.dumps(entry))) == 1.0
    assert score(Answer("\\boxed{1}", json.dumps(entry))) < 0.1
    with pytest.raises(Ungradable, match="no task of reasoning-gym"):
        score(Answer("\\boxed{1}", "1", data_source="elsewhere"))


def test_reasoning_gym_that_is_not_installed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install reasoning_gym"):
        registry.check(RewardConfig(name="reasoning_gym"))


def test_the_registry_has_what_the_configuration_allows() -> None:
    assert {*registry.LOCAL, "http"} == set(REWARDS)


BASE = {"name": "t", "model": {"path": "m"}, "data": {"train": "d"}}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"name": "maths"}, r"reward\.name: given 'maths'.*allowed: math, .*did you mean 'math'"),
        ({"name": {"math": 0.9, "fromat": 0.1}}, r"reward\.name: .*did you mean 'format'"),
        ({"by_source": {"gsm8k": "exakt"}}, r"reward\.by_source\.gsm8k: .*did you mean 'exact'"),
        ({"name": "overlong"}, r"algorithm\.overlong\.buffer"),
        ({"name": {}}, "a sum of no rewards"),
        ({"name": "http"}, r"reward\.http\.url"),
        ({"pattern": "("}, "not a regular expression"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_with_the_configuration(reward: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated({**BASE, "reward": reward}, "t")


def test_rewards_are_chosen_by_overrides() -> None:
    changes = ["reward.name={math: 0.9, format: 0.1}", "reward.by_source.gpqa=choice", "reward.code.time_s=2"]
    reward = apply_overrides(Config(**BASE), changes).reward
    assert reward.names == ["math", "format", "choice"]
    assert reward.code.time_s == 2.0


def test_sums_and_choices_by_source(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def long(response, ground_truth): return float(len(response) > 9)\n"
        "def source(response, ground_truth, data_source): return float(data_source == ground_truth)\n"
    )
    settings = RewardConfig(
        name={"math": 0.7, "format": 0.2, f"{tmp_path}/mine.py:long": 0.1},
        by_source={"gpqa": "choice", "mine": f"{tmp_path}/mine.py:source"},
    )
    given = [
        Answer("\\boxed{7}.", "7"),
        Answer("\\boxed{7}", "7"),
        Answer("\\boxed{8}.", "7"),
        Answer("7", "7"),
        Answer("\\boxed{A}", "A", data_source="gpqa"),
        Answer("", "mine", data_source="mine"),
        Answer("\\boxed{A}", "?", data_source="gpqa"),
    ]
    with GraderPool(settings) as pool:
        grades = asyncio.run(pool.grade(given))
    assert [grade.score for grade in grades[:-1]] == [1.0, pytest.approx(0.9), pytest.approx(0.3), 0.0, 1.0, 1.0]
    assert (grades[-1].score, grades[-1].cause) == (None, Cause.ERROR)
    assert pool.ungraded == {"error": 1}


def test_a_sum_with_a_part_that_has_no_grade_has_none() -> None:
    parts = {"math": graded(1.0), "code": ungraded(Cause.DEADLINE, "late")}
    assert weighted({"math": 0.5, "code": 0.5}, parts) == Grade(None, Cause.DEADLINE, "late")


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_is_a_number(score: float) -> None:
    with pytest.raises(ValueError, match="a reward of"):
        graded(score)


def test_a_function_that_cannot_be_imported_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.name: 'nowhere:f' cannot be imported"):
        registry.check(RewardConfig(name="nowhere:f"))
    with pytest.raises(ConfigError, match=r"cannot be imported.*No such file"):
        GraderPool(RewardConfig(name=f"{tmp_path}/none.py:f"))
