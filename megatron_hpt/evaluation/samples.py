"""What an evaluation leaves behind: a folder with every sample, from which all tables follow without an engine.

EVALUATION/evaluation.json            model, protocol and files of problems with their sha256 (`Evaluation`)
EVALUATION/samples/<benchmark>.parquet    one row a sample (SCHEMA), problems in the order of their file, samples from 0

`megatron-hpt evaluate` and the evaluations of a run (RUN/evaluations/step_000020) write the same folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.errors import DataError
from megatron_hpt.files import whole, write_whole

Key = tuple[str, int]
"""What identifies a sample: the id of its problem, and its number."""
FORMAT = 1
RECORD = "evaluation.json"
SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),  # 0 … k-1 of its problem
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("data_source", pa.string(), nullable=False),
        pa.field("level", pa.string()),  # difficulty, where the data has one
        pa.field("prompt", pa.string(), nullable=False),  # as the model saw it
        pa.field("response", pa.string(), nullable=False),
        pa.field("ground_truth", pa.string(), nullable=False),
        pa.field("answer", pa.string()),  # as the grader reads it: of most the last box; null: none. What maj@k counts
        pa.field("tokens", pa.int32(), nullable=False),  # of the response, end-of-sequence included
        pa.field("truncated", pa.bool_(), nullable=False),  # hit the limit of tokens
        pa.field("score", pa.float64()),  # null: ungraded
        pa.field("ungraded_reason", pa.string()),  # null: graded
        pa.field("grader", pa.string(), nullable=False),
    ]
)
"""A row is one sample of one problem."""


@dataclass(frozen=True)
class SampleRow:
    """A row of SCHEMA."""

    problem_id: str
    sample: int
    seed: int
    data_source: str
    level: str | None
    prompt: str
    response: str
    ground_truth: str
    answer: str | None
    tokens: int
    truncated: bool
    score: float | None = None
    ungraded_reason: str | None = None
    grader: str = ""


@dataclass(frozen=True)
class Protocol:
    """How a model is sampled. Two evaluations can be compared only if their protocols are the same."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    system_prompt: str | None = None
    """It is put before every problem that has none of its own."""
    chat_template: str | None = None
    """It replaces the tokenizer's own."""


@dataclass(frozen=True)
class SetRecord:
    """One benchmark of an evaluation."""

    file: str
    sha256: str
    """Digest of the file."""
    problems: int
    samples: int
    """How many samples each problem has."""
    grader: str


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json says."""

    model: str
    """What the user named: a folder, a checkpoint, a part of a run, or a server's URL."""
    weights: str
    """Tells different weights in one place apart: a digest of the files' names, sizes and times; the label of a server."""
    protocol: Protocol
    benchmarks: dict[str, SetRecord]
    """The benchmarks by name, in the order of the table."""
    step: int | None = None
    """How many optimizer steps the weights have had, if they are a run's."""
    engine: str = ""
    dtype: str = ""
    """The dtype of the computation; empty for a server, which does not say."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The keys of config.json that were given other values."""


def write_record(folder: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json."""
    write_whole(folder / RECORD, json.dumps({"format": FORMAT, **asdict(evaluation)}, indent=1, ensure_ascii=False) + "\n")


def read_record(folder: Path) -> Evaluation:
    """Read what `write_record` wrote.

    Raises:
        DataError: not the folder of an evaluation, or one of another version.
    """
    path = folder / RECORD
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise DataError(f"{path}: another version's evaluation; this one reads format {FORMAT}")
        sets = {name: SetRecord(**one) for name, one in tree.pop("benchmarks").items()}
        return Evaluation(**{**tree, "protocol": Protocol(**tree["protocol"]), "benchmarks": sets})
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{folder}: not the folder of an evaluation ({RECORD}: {error!r})") from None


def samples_file(folder: Path, benchmark: str) -> Path:
    """Return where the samples of a benchmark are once all of them are there."""
    return folder / "samples" / f"{benchmark}.parquet"


def write_samples(path: Path, rows: Sequence[SampleRow]) -> None:
    """Write the samples of one benchmark, whole."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)
    with whole(path) as temporary:
        pq.write_table(table, temporary)


def read_samples(path: Path) -> list[SampleRow]:
    """What `write_samples` wrote.

    Raises:
        DataError: no such file, or not one of samples; names it.
    """
    return [SampleRow(**row) for row in read_columns(path, SCHEMA.names)]


def read_columns(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read some columns of a file of samples; the others stay on the disk. Raises as `read_samples`."""
    with _readable(path):
        file = pq.ParquetDataset(path)
        if missing := [name for name in columns if name not in file.schema.names]:
            raise DataError(f"{path}: not a file of samples: it has no column {', '.join(missing)}")
        return file.read(columns=list(columns)).to_pylist()


def count_samples(path: Path) -> int:
    """Count the samples in a file. Raises as `read_samples`."""
    with _readable(path):
        return pq.read_metadata(path).num_rows


def check_complete(path: Path, there: Iterable[Key], record: SetRecord) -> None:
    """Check a benchmark's samples against the record of its evaluation: each problem has samples 0 … k-1, each once.

    Args:
        there: the key of every sample in the file.

    Raises:
        DataError: names what is missing and what is doubled.
    """
    counts = Counter(there)
    problems = dict.fromkeys(problem for problem, _ in counts)
    wrong = [*(f"{_told(key)} is there {number} times" for key, number in counts.items() if number > 1)]
    wrong += [f"{_told((name, k))} is missing" for name in problems for k in range(record.samples) if (name, k) not in counts]
    wrong += [f"{_told(key)} is not one of its {record.samples} samples" for key in counts if not 0 <= key[1] < record.samples]
    if len(problems) != record.problems:
        wrong.append(f"it has {len(problems)} problems, and {record.problems} were asked")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{path}: not the samples that {RECORD} tells of: {'; '.join(wrong[:_SHOWN])}{more}; restore the file, or evaluate "
            "into a new folder"
        )


_SHOWN = 5
"""How many of the things that are wrong with a file are named."""


def _told(key: Key) -> str:
    return f"problem {key[0]!r}, sample {key[1]}"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable file of samples: {error}") from None
