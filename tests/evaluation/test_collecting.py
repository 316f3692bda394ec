"""An evaluation that ends anywhere and goes on is the evaluation that did not end."""

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.config import RewardConfig
from megatron_hpt.engines.types import Sample, SamplingRequest
from megatron_hpt.errors import ConfigError, DataError, EngineError
from megatron_hpt.evaluation.collecting import Collection, SampleSource
from megatron_hpt.evaluation.grading import Graders, checked_grader, label, settings_of
from megatron_hpt.evaluation.journal import Journal
from megatron_hpt.evaluation.problems import EvaluationProblem
from megatron_hpt.evaluation.samples import (
    Evaluation,
    Protocol,
    SampleRow,
    SetRecord,
    read_record,
    read_samples,
    samples_file,
    write_record,
)
from megatron_hpt.examples import tiny_llama

TOKENIZER = tiny_llama.tokenizer()
SETS = {
    name: [EvaluationProblem(f"{name}-{i}", [5 + i, 15], TOKENIZER.decode([5 + i, 15]), str(i)) for i in range(number)]
    for name, number in (("easy", 3), ("hard", 2))
}


class Sampler:
    """Answers by seed alone, in any order, and dies after a number of answers."""

    def __init__(self, lives: float, order: random.Random) -> None:
        self.lives, self.asked, self._order = lives, 0, order

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        await asyncio.sleep(self._order.random() / 1000)
        if self.lives <= 0:
            raise EngineError("the engine died")
        self.lives, self.asked = self.lives - 1, self.asked + 1
        tokens = [3, 5 + request.seed % 4, 4, 1]  # \boxed{0} … \boxed{3}
        return [Sample(tokens, [0.0] * 4, "stop" if request.seed % 3 else "length", ((0, 4),))]


def record(samples: int = 4) -> Evaluation:
    sets = {name: SetRecord("x", "y", len(problems), samples, "math") for name, problems in SETS.items()}
    return Evaluation("model", "weights", Protocol(0.6, 0.95, 16, 0), sets)


def fill(folder: Path, graders: Graders, lives: float = float("inf"), seed: int = 0, samples: int = 4) -> int:
    """Samples that were drawn."""
    sampler = Sampler(lives, random.Random(seed))
    with Collection(folder, record(samples), SETS) as collection:
        asyncio.run(collection.fill(SampleSource(sampler, TOKENIZER, 3), graders))
    return sampler.asked


@pytest.fixture(scope="module")
def graders():
    with Graders(RewardConfig()) as graders:
        yield graders


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, graders: Graders) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("whole")
    assert fill(folder, graders) == 20
    return {name: read_samples(samples_file(folder, name)) for name in SETS}


def test_samples_are_in_order_graded_and_seeded_one_by_one(uninterrupted: dict[str, list]) -> None:
    rows = uninterrupted["easy"]
    assert [(row.problem_id, row.sample) for row in rows] == [(f"easy-{i}", k) for i in range(3) for k in range(4)]
    assert len({row.seed for rows in uninterrupted.values() for row in rows}) == 20
    for row in rows:
        assert row.response == "\\boxed{" + str(row.seed % 4) + "}"
        assert row.answer == str(row.seed % 4)
        assert row.score == float(row.answer == row.ground_truth)
        assert row.truncated == (row.seed % 3 == 0)
        assert (row.tokens, row.grader, row.ungraded_reason) == (4, "math", None)


@settings(max_examples=15)
@given(lives=st.lists(st.integers(0, 12), max_size=4), torn=st.booleans(), seed=st.integers(0, 2**32))
def test_where_it_ends_makes_no_difference(tmp_path_factory, graders, uninterrupted, lives, torn, seed) -> None:
    folder = tmp_path_factory.mktemp("cut")
    for life in lives:
        if life < 20 - sum(len(journal_rows(folder, name)) for name in SETS):
            with pytest.raises(EngineError, match="the engine died"):
                fill(folder, graders, life, seed)
        if torn:
            for journal in folder.glob("samples/*.jsonl"):
                journal.write_bytes(journal.read_bytes()[:-3])
    fill(folder, graders, seed=seed)
    assert {name: read_samples(samples_file(folder, name)) for name in SETS} == uninterrupted
    assert not list(folder.glob("samples/*.jsonl"))


def journal_rows(folder: Path, name: str) -> list:
    file = samples_file(folder, name)
    if file.is_file():
        return read_samples(file)
    with Journal(folder / "samples" / f"{name}.partial.jsonl") as journal:
        return list(journal.rows)


def test_more_samples_keep_those_that_are_there(tmp_path: Path, graders: Graders, uninterrupted: dict[str, list]) -> None:
    assert fill(tmp_path, graders, samples=1) == 5
    assert fill(tmp_path, graders, samples=4) == 15
    assert fill(tmp_path, graders, samples=4) == 0
    assert {name: read_samples(samples_file(tmp_path, name)) for name in SETS} == uninterrupted


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path, record())
    assert read_record(tmp_path) == record()
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="not the folder of an evaluation"):
        read_record(tmp_path)


def test_a_label_names_sums_and_rewards_by_source_too() -> None:
    plain = RewardConfig(name="math_strict", tolerance=0.1)
    mixed = RewardConfig(name={"math": 0.9, "format": 0.1}, by_source={"gpqa": "choice"}, tolerance=0.1)
    assert label(plain) == "math_strict"
    for reward in (plain, mixed):
        assert settings_of(label(reward), RewardConfig(tolerance=0.1)) == reward


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("maht", "did you mean 'math'"),
        ("{maht: 1}", "did you mean 'math'"),
        ("{math", "is not a YAML value.*; expected a reward, or a sum"),
        ("{math: much}", "valid number"),
        ("http", r"reward\.http\.url: given ''; the http reward needs a server"),
    ],
)
def test_a_grader_that_is_none_is_refused(grader: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(grader, RewardConfig())


def test_a_sum_is_written_as_in_settings() -> None:
    assert checked_grader("{math: 0.9, format: 0.1}", RewardConfig()) == label(RewardConfig(name={"math": 0.9, "format": 0.1}))
    assert checked_grader("math", RewardConfig()) == "math"


@pytest.mark.parametrize(
    ("grader", "answers"),
    [("choice", ["B", "B", "C", None]), ("math", [None, "\\text{B}", "C", None])],
)
def test_votes_are_for_what_the_grader_reads(graders: Graders, grader: str, answers: list[str | None]) -> None:
    """A letter that counts as right without a box is a vote too."""
    responses = ("so the answer is B.", "\\boxed{\\text{B}}", "\\boxed{C}", "who knows")
    rows = [SampleRow("p", n, 0, "", None, "", text, "B", None, 1, False) for n, text in enumerate(responses)]
    assert [row.answer for row in asyncio.run(graders.grade(rows, grader))] == answers
