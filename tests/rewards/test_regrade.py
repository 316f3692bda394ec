"""The tool that grades a file."""

import json
import re
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_hpt.errors import DataError
from megatron_hpt.rewards import regrade
from tests import programs

ROOT = Path(__file__).parents[2]
ROWS = [
    {"output": "\\boxed{\\frac{2}{4}}", "reward_model": {"ground_truth": "0.5"}, "id": 0},
    {"output": "\\boxed{25\\%} [bold]", "reward_model": {"ground_truth": "25"}, "id": 1},
    {"output": "none", "reward_model": {"ground_truth": "7"}, "id": 2},
]


def run(*arguments: object) -> subprocess.CompletedProcess:
    return programs.tool("grade.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_grades_are_written_and_disagreements_printed(tmp_path: Path, suffix: str) -> None:
    given, out = tmp_path / "answers.jsonl", tmp_path / f"grades{suffix}"
    given.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    columns = ["--response", "output", "--truth", "reward_model.ground_truth"]
    done = run(given, *columns, "--grader", "math", "--against", "math_strict", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "math: 3 answers, mean 0.6667, right 66.7%, ungraded: none" in done.stdout
    assert "1 disagreements of 3: math is higher in 1, math_strict in 0" in done.stdout
    assert "25\\%} [bold]" in done.stdout
    rows = pq.read_table(out).to_pylist() if suffix == ".parquet" else list(map(json.loads, out.read_text().splitlines()))
    assert [(row["id"], row["grade_math"], row["grade_math_strict"]) for row in rows] == [(0, 1, 1), (1, 1, 0), (2, 0, 0)]
    assert [row["ungraded_math"] for row in rows] == [None] * 3


def test_what_cannot_be_graded_keeps_its_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"response": "B", "ground_truth": "7"}))
    done = run(tmp_path / "a.jsonl", "--grader", "choice", "--out", tmp_path / "g.jsonl")
    assert "choice: 1 answers, ungraded: error 1" in done.stdout
    row = json.loads((tmp_path / "g.jsonl").read_text())
    assert row["grade_choice"] is None
    assert "not a letter" in row["ungraded_choice"]


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"response": "x", "answer": "7"}\n')
    done = run(tmp_path / "a.jsonl")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "row 0: no text in 'ground_truth'; its columns are response, answer" in done.stderr
    misspelt = run(tmp_path / "a.jsonl", "--truth", "answer", "--grader", "maht").stderr
    assert "did you mean 'math'" in misspelt
    assert "..." not in misspelt  # what YAML ends a document with
    done = run(tmp_path / "a.jsonl", "--truth", "answer", "--out", tmp_path / "grades.csv")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)  # nothing was graded
    assert "grades.csv: not a kind of file that is written; allowed: .parquet, .jsonl" in done.stderr
    for content, message in (("{", "line 1: not JSON"), ("[1]", "line 1: a list"), ("", "has no rows")):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            regrade.read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"cannot be read as \.parquet"):
        regrade.read_rows(tmp_path / "a.parquet")


def test_samples_that_are_missing_or_doubled_are_named(tmp_path: Path) -> None:
    rows = [{"problem_id": p, "sample": k, "response": "A", "ground_truth": "A"} for p in "xy" for k in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:1], *rows[2:], rows[5]]))
    done = run(tmp_path / "a.jsonl", "--grader", "choice")
    assert done.returncode == 0
    assert "note: problem 'y', sample 2 is there 2 times\nnote: problem 'x' lacks sample 1\n" in done.stdout
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "note" not in run(tmp_path / "a.jsonl", "--grader", "choice").stdout


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "not a kind of file that is written"),
        ("folder.jsonl", "is a folder; give the name of a file"),
        ("file.txt/g.jsonl", "cannot be written: .*file.txt"),
        ("n" * 250 + ".jsonl", "a name of 256 bytes; at most 235: choose a shorter one"),
        ("dangling/g.jsonl", "cannot be written"),
        ("mixed.parquet", "parquet wants one type a column .*choose .jsonl"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_graded(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    rows = [{"response": "A", "ground_truth": "A", "more": more} for more in (1, "x")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path / "a.jsonl", "--grader", "choice", "--out", tmp_path / out)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    "option", [("--deadline-s", "inf"), ("--deadline-s", "nan"), ("--workers", "100000000"), ("--show", "-1")]
)
def test_numbers_that_mean_nothing_are_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    done = run(tmp_path / "a.jsonl", *option)
    assert done.returncode == 2
    assert option[0] in done.stderr
