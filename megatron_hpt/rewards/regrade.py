"""A file of answers, graded again by one reward or several, and where they disagree."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import DataError
from megatron_hpt.files import check_file, check_input, whole
from megatron_hpt.rewards.grades import Answer, Grade
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.settings.sections import MOST_SAMPLES

_SHOWN = 5
"""How many missing samples of one problem are named."""
BUNCH = 512
"""How many answers are graded between two reports of progress."""


@dataclass(frozen=True)
class Columns:
    """Where a file has what a grader needs; ``a.b`` is field b of the record in column a."""

    response: str = "response"
    truth: str = "ground_truth"
    source: str = "data_source"
    prompt: str = "prompt"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL or parquet file of answers, all at once, since they are written again with their grades.

    This is not the reader of prompts (`data.storage`): any JSON object is a row, and errors count lines as an editor does.

    Raises:
        DataError: it is neither, or has no rows; names file and line.
    """
    check_input(path)
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
        else:
            with path.open(encoding="utf-8") as lines:
                rows = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix or 'JSONL'}: {error}") from None
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}; expected an object of named fields")
    return row


def answers_of(rows: Sequence[dict[str, Any]], columns: Columns, path: Path) -> list[Answer]:
    """Make the answers that rows hold.

    Raises:
        DataError: a row without response or ground truth; names the row and the columns that there are.
    """
    answers = []
    for number, row in enumerate(rows):
        response, truth = _text(row, columns.response), _text(row, columns.truth)
        for name, value in ((columns.response, response), (columns.truth, truth)):
            if value is None:
                raise DataError(f"{path}, row {number}: no text in {name!r}; its columns are {', '.join(row)}")
        answers.append(Answer(response or "", truth or "", _text(row, columns.prompt) or "", _text(row, columns.source) or ""))
    return answers


def _text(row: Any, path: str) -> str | None:
    for name in path.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return str(row) if isinstance(row, (str, int, float)) else None


def doubtful(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say which samples of an evaluation (columns problem_id and sample) are in the file twice or are missing.

    A mean over such a file is not that of what was sampled. Of files without these columns nothing is known.
    """
    if not all({"problem_id", "sample"} <= row.keys() and isinstance(row["sample"], int) for row in rows):
        return
    counts = Counter((str(row["problem_id"]), row["sample"]) for row in rows)
    samples = min(MOST_SAMPLES, 1 + max(sample for _, sample in counts))
    for (problem, sample), number in counts.items():
        if number > 1:
            yield f"problem {problem!r}, sample {sample} is there {number} times"
    for problem in dict.fromkeys(problem for problem, _ in counts):
        if missing := [k for k in range(samples) if (problem, k) not in counts]:
            yield f"problem {problem!r} lacks sample{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:_SHOWN]))}"


def grade_in_bunches(answers: Sequence[Answer], settings: RewardConfig, done: Callable[[int], None]) -> list[Grade]:
    """Grade answers in order.

    Args:
        done: is called with the number that are graded.

    Raises:
        ConfigError: the reward cannot be made here.
    """
    grades: list[Grade] = []
    with GraderPool(settings) as pool:
        for start in range(0, len(answers), BUNCH):
            grades += asyncio.run(pool.grade(answers[start : start + BUNCH]))
            done(len(grades))
    return grades


def disagreements(first: Sequence[Grade], second: Sequence[Grade]) -> Iterator[int]:
    """Yield the places of the answers to which both give a score, but not the same."""
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        if None not in (one.score, other.score) and one.score != other.score:
            yield place


def summary(grades: Sequence[Grade]) -> dict[str, Any]:
    """Count answers, and give their mean score, the share of scores of exactly 1, and by cause what is ungraded."""
    scores = [grade.score for grade in grades if grade.score is not None]
    return {
        "answers": len(grades),
        "mean": sum(scores) / len(scores) if scores else None,
        "right": sum(score == 1.0 for score in scores) / len(scores) if scores else None,
        "ungraded": dict(Counter(str(grade.cause) for grade in grades if grade.cause)),
    }


def check_out(path: Path, source: Path) -> None:
    """Refuse what `write` could not write, before anything is graded.

    Raises:
        DataError: the file that is graded, another ending, or a place where nothing can be written.
    """
    if path.resolve() == source.resolve():
        raise DataError(f"{path}: is the file of answers itself; write to another one")
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{path}: not a kind of file that is written; allowed: .parquet, .jsonl")
    check_file(path)


def check_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse rows that a kind of file cannot hold, before they are graded.

    Raises:
        DataError: what it cannot hold.
    """
    try:
        if path.suffix == ".parquet":
            pa.Table.from_pylist(list(rows))
        else:
            json.dumps(rows)
    except pa.ArrowException as error:
        raise DataError(f"{path}: parquet wants one type a column ({error}); choose .jsonl") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON does not hold all of what the rows hold ({error}); choose .parquet") from None


def write(path: Path, rows: Sequence[dict[str, Any]], graded: dict[str, Sequence[Grade]]) -> None:
    """Write the rows as parquet or JSONL, with `grade_<reward>` (null: ungraded) and `ungraded_<reward>` (the reason)."""
    columns: dict[str, list[Any]] = {}
    for name, grades in graded.items():
        columns[f"grade_{name}"] = [grade.score for grade in grades]
        columns[f"ungraded_{name}"] = [grade.reason for grade in grades]
    wider = [{**row, **{key: values[place] for key, values in columns.items()}} for place, row in enumerate(rows)]
    with whole(path) as temporary:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(wider), temporary)
        else:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in wider), encoding="utf-8")
