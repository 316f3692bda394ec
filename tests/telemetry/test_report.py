"""The page and the picture of runs: what is written and what is told. In a browser: test_browser.py."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.cli import app
from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import ConfigError, DataError
from megatron_hpt.objective.gate import Choice
from megatron_hpt.run import RunDir, create
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.report import answers, record, timelines, visits
from megatron_hpt.telemetry.report.visits import State, Visit
from megatron_hpt.telemetry.report.write import write_report

from .runs import BLUE, HOSTILE, VERMILION

# -- what is written


@pytest.mark.slow
def test_the_picture_lies_beside_the_page_and_shows_every_run(report: Path) -> None:
    picture = Image.open(BytesIO(report.with_suffix(".png").read_bytes())).convert("RGB")
    counted = {color for count, color in picture.getcolors(1 << 20) if count > 100}
    assert counted >= {tuple(bytes.fromhex(color[1:])) for color in (BLUE, VERMILION)}


@pytest.mark.slow
def test_one_run_has_its_page_in_its_folder(runs: list[RunDir]) -> None:
    assert write_report(runs[2:]) == runs[2].path / "report.html"
    page, picture = (runs[2].path / name for name in ("report.html", "report.png"))
    assert page.stat().st_size < 2_000_000
    assert picture.is_file()


def test_the_command_writes_one_page_of_several_runs_and_refuses_what_is_none(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", *(str(run.path) for run in runs)])
    assert done.stdout == "wrote report.html\n"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.png"}
    refused = CliRunner().invoke(app, ["report", str(runs[0].path), "--out", "curves.png"])
    assert "given curves.png; the page's name ends in .html" in str(refused.exception)
    refused = CliRunner().invoke(app, ["report", str(runs[0].path), str(tmp_path)])
    assert isinstance(refused.exception, ConfigError)
    assert f"{tmp_path}: not a run directory (it has no config.yaml)" in str(refused.exception)


def test_no_step_no_page(tmp_path: Path) -> None:
    run = create(Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t")), tmp_path)
    with pytest.raises(DataError, match="no finished step to draw"):
        write_report([run])


# -- what is told of a run


def test_long_runs_are_averaged_and_the_last_point_is_the_last_step(
    runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "MOST_POINTS", 7)
    one = record.read(runs[0], "hpt")
    curve = one.curve("rollout/accuracy")
    assert (len(curve), one.grid.step[0], one.grid.step[-1]) == (7, 5, 39)
    assert curve[0] == pytest.approx(sum(line["rollout/accuracy"] for line in one.lines[:6]) / 6)
    assert one.grid.hours[-1] == pytest.approx(
        sum(line["time/step_s"] + line.get("time/eval_s", 0) for line in one.lines) / 3600
    )
    assert "mean of 6 steps" in " ".join(record.notes(one))


def test_steps_that_were_taken_in_part_are_told_with_the_reason(runs: list[RunDir]) -> None:
    whole = record.read(runs[0], "hpt")
    partly = {"train/updates": 3, "train/skipped": 1, "train/skip_reason": "update 2 of 4: the gradient norm is inf"}
    one = replace(whole, lines=[line | (partly if line["step"] == 5 else {}) for line in whole.lines])
    assert one.not_taken == []
    assert "1 of the steps were taken in part (step 5): update 2 of 4: the gradient norm is inf" in record.notes(one)


def test_an_evaluation_stands_where_its_version_was_made(runs: list[RunDir]) -> None:
    one = record.read(runs[0], "hpt")
    grid, values = one.evaluations("eval/heldout/avg@8")
    assert grid.step == list(range(0, 40, 5))
    assert grid.tokens[:2] == [0, one.spent.tokens[4]]  # version 5 is there after step 4
    assert values == [line["eval/heldout/avg@8"] for line in one.lines[::5]]


def test_names_tell_the_runs_apart(runs: list[RunDir], tmp_path: Path) -> None:
    assert record.labels(runs) == ["hpt", "grpo", "luffy"]
    assert record.labels(runs[:1]) == [runs[0].path.name]
    for folder in ("a", "b"):
        shutil.copytree(runs[0].path, tmp_path / folder / "same")
    copies = [RunDir(tmp_path / folder / "same") for folder in ("a", "b")]
    assert record.labels(copies) == ["a/same", "b/same"]
    assert record.labels([runs[0], replace(runs[0], path=tmp_path / "a" / "same")]) == [runs[0].path.name, "same"]


def test_settings_that_differ_are_named(runs: list[RunDir]) -> None:
    found = dict(record.differences([record.read(run, "") for run in runs]))
    assert found["algorithm.name"] == ["hpt", "grpo", "luffy"]
    assert found["trainer.steps"] == ["40", "40", "1"]
    assert "trainer.seed" not in found


# -- the gate's decisions

SEEN = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("abcdef"), st.sampled_from(Choice), st.integers(0, 4)), max_size=60
)
_WEIGHTS = {Choice.ROLLOUTS: (1.0, 0.0), Choice.BOTH: (0.5, 1.5), Choice.SKIPPED: (0.0, 0.0)}


def visited(seen: list) -> list[Visit]:
    return [
        Visit(step, 0, prompt, "first" if prompt < "d" else "second", choice, solved, 4, *_WEIGHTS.get(choice, (0.0, 1.0)))
        for step, prompt, choice, solved in sorted(seen, key=lambda entry: entry[0])
    ]


@given(seen=SEEN)
def test_shares_are_means_over_the_visits_that_train(seen: list) -> None:
    decided = visited(seen)
    by_source = visits.by_source(decided)
    trained = [visit for visit in decided if visit.rollout_weight + visit.demonstration_weight]
    assert set(by_source) == {visit.source for visit in trained}
    for source, curve in by_source.items():
        for step, share in curve:
            own = [visit for visit in trained if (visit.source, visit.step) == (source, step)]
            assert share == pytest.approx(
                sum(v.demonstration_weight / (v.rollout_weight + v.demonstration_weight) for v in own) / len(own)
            )
    assert sum(map(len, visits.by_difficulty(decided).values())) <= len(trained)


@given(seen=SEEN)
def test_every_prompt_stands_somewhere_and_its_way_has_no_gap(seen: list) -> None:
    decided = visited(seen)
    assert all(sum(shares.values()) == pytest.approx(1) for _, shares in visits.population(decided))
    found = timelines.timelines(decided)
    assert found.prompts == len({visit.prompt_id for visit in decided})
    for timeline in found.shown:
        own = [visit for visit in decided if visit.prompt_id == timeline.prompt_id]
        assert timeline.segments[0].start == own[0].step
        assert timeline.segments[-1].end == decided[-1].step + 1
        assert timeline.segments[-1].state is own[-1].state
        for before, after in pairwise(timeline.segments):
            assert before.end == after.start
            assert before.state is not after.state


@given(seen=SEEN)
def test_transitions_count_every_return(seen: list) -> None:
    decided = visited(seen)
    returns = len(decided) - len({visit.prompt_id for visit in decided})
    assert visits.transitions(decided).total() == returns


def test_difficulty_is_the_share_solved_in_the_whole_run() -> None:
    decided = visited(
        [(step, "a", Choice.ROLLOUTS, 1) for step in range(4)] + [(0, "b", Choice.DEMONSTRATION, 0), (0, "c", Choice.BOTH, 4)]
    )
    assert list(visits.by_difficulty(decided)) == ["never solved", "up to 25 % solved", "75 to 100 % solved"]
    assert visits.by_difficulty(decided)["75 to 100 % solved"] == [(0, 0.75)]


def test_a_prompt_is_solved_when_every_graded_answer_is_right() -> None:
    right = visited([(0, "a", choice, 4) for choice in Choice])
    assert [visit.state for visit in right if visit.choice is not Choice.DEMONSTRATION] == [State.SOLVED] * 4
    assert next(visit.state for visit in right if visit.choice is Choice.DEMONSTRATION) is State.SFT


def test_the_ledger_agrees_with_the_recorded_shares(runs: list[RunDir]) -> None:
    decided = visits.read(Ledger(runs[0].path / "batches")).all
    for line in metrics.read(runs[0].metrics)[::9]:
        own = [visit for visit in decided if visit.step == line["step"]]
        assert sum(visit.choice is Choice.DEMONSTRATION for visit in own) / len(own) == pytest.approx(line["gate/sft_share"])


def test_long_ledgers_are_sampled_and_damaged_batches_told(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(shutil.copytree(runs[0].batches, tmp_path / "batches"))
    ledger.path(2).write_bytes(b"no arrow")
    found = visits.read(ledger)
    assert (found.every, len(found.all)) == (1, 390)
    assert "step_000002.arrow: cannot be read as a batch" in found.unreadable[0]
    monkeypatch.setattr(visits, "MOST_DECISIONS", 100)
    sampled = visits.read(ledger)
    assert sampled.every == 4
    assert sorted({visit.step for visit in sampled.all}) == list(range(0, 40, 4))


# -- answers


def test_answers_cover_the_run_within_their_budget(runs: list[RunDir]) -> None:
    one = record.read(runs[0], "hpt")
    decided = visits.read(Ledger(runs[0].batches)).all
    for budget in (20_000, 60_000):
        reading = answers.read(one, decided, budget)
        steps = [entry["step"] for entry in reading.steps]
        assert len(json.dumps(reading.steps).encode()) <= budget + 200
        assert (steps[0], steps[-1]) == (0, 39)
        gaps = [after - before for before, after in pairwise(steps)]
        assert max(gaps) <= 2 * min(gaps) + 2  # halved, as far as the budget goes
    assert answers.read(one, decided, 100).steps == []


def test_a_shown_prompt_is_what_the_ledger_has(runs: list[RunDir], tokenizer: Any) -> None:
    one, ledger = record.read(runs[0], "hpt"), Ledger(runs[0].batches)
    reading = answers.read(one, visits.read(ledger).all, 10**7)
    entry = next(entry for entry in reading.steps if entry["step"] == 20)
    rows = ledger.read(20).rows
    for prompt in entry["prompts"]:
        own = [row for row in rows if row.prompt_id == prompt["prompt_id"] and row.source == "rollout"]
        assert prompt["text"] == tokenizer.decode(own[0].tokens[: own[0].prompt_length])
        assert sorted(a["text"] for a in prompt["answers"]) == sorted(
            tokenizer.decode(r.tokens[r.prompt_length :]) for r in own
        )
        assert [a["reward"] for a in prompt["answers"]] == sorted((row.reward for row in own), reverse=True)
    solved = [prompt for prompt in reading.steps[-1]["prompts"] if prompt["demonstration"]]
    assert solved
    for prompt in solved:  # taught before
        number = prompt["text"].split("+")[0]
        assert prompt["choice"] == Choice.ROLLOUTS
        assert prompt["demonstration_step"] < 39
        assert prompt["demonstration"] == f"{number}+1={int(number) + 1}<eos>"


def test_texts_are_cut_in_the_middle_and_without_a_tokenizer_they_are_ids(
    runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_HEAD", 5)
    monkeypatch.setattr(answers, "_TAIL", 4)
    run = RunDir(shutil.copytree(runs[0].path, tmp_path / "run"))
    config = run.config.read_text()
    run.config.write_text(config.replace(str(record.read(run, "").config.model.path), "gone"))
    reading = answers.read(record.read(run, "x"), visits.read(Ledger(run.batches)).all, 10**6)
    assert reading.problems == ["No tokenizer in gone, nor in the run's export or checkpoints: texts are shown as token ids."]
    text = reading.steps[0]["prompts"][0]["answers"][0]["text"]
    head, middle, tail = text.split("\n")
    assert (len(head), len(tail)) == (5, 4)
    assert "characters left out" in middle
    assert set(head + tail) <= set("0123456789 ")


def test_only_the_chosen_rows_are_read(runs: list[RunDir]) -> None:
    ledger = Ledger(runs[0].batches)
    rows = ledger.select(3, [1, 4], ("group", "prompt_id", "reward"))
    expected = [(row.group, row.prompt_id, row.reward) for row in ledger.read(3).rows if row.group in (1, 4)]
    assert [(row["group"], row["prompt_id"], row["reward"]) for row in rows] == expected
    assert HOSTILE in {row.prompt_id for step in range(3) for row in ledger.read(step).rows}
