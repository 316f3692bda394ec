"""The tool that grades a file."""

import json
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
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "row 0: no text in 'ground_truth'; its columns are response, answer" in done.stdout
    misspelt = run(tmp_path / "a.jsonl", "--truth", "answer", "--grader", "maht").stdout
    assert "did you mean 'math'" in misspelt
    assert "..." not in misspelt  # what YAML ends a document with
    done = run(tmp_path / "a.jsonl", "--truth", "answer", "--out", tmp_path / "grades.csv")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)  # nothing was graded
    assert "grades.csv: not a kind of file that is written; allowed: .parquet, .jsonl" in done.stdout
    for content, message in (("{", "line 1: not JSON"), ("[1]", "line 1: a list"), ("", "has no rows")):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match=message):
            regrade.read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"cannot be read as \.parquet"):
        regrade.read_rows(tmp_path / "a.parquet")
