"""Writing the project's parquet schema (docs/data.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.storage.formats import MESSAGES
from megatron_hpt.files import whole

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("target", MESSAGES),
        ("target_lst", pa.list_(pa.string())),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([(name, pa.string()) for name in ("split", "index", "level")])),
    ]
)
ROW_GROUP = 1024
"""How many rows are written, and later read, together; a reader holds so many in memory."""

Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Problem:
    """One problem as text."""

    question: str
    answer: str
    demonstration: str | None
    """A written-out solution whose last \\boxed{…} holds the answer."""
    more: tuple[str, ...] = ()
    """Demonstrations besides the first."""
    before: tuple[Message, ...] = ()
    """What comes before the question: a system prompt, earlier turns."""
    level: str | None = None
    """How hard the problem is, in the words of its source."""

    @property
    def prompt(self) -> list[Message]:
        """The chat that is rendered: what comes before the question, and the question as the user's message."""
        return [*self.before, {"role": "user", "content": self.question}]

    @property
    def demonstrations(self) -> list[str]:
        """All demonstrations, the first one first."""
        return [self.demonstration, *self.more] if self.demonstration else []


def schema_row(problem: Problem, source: str, split: str, index: str) -> dict[str, Any]:
    """Return the row of SCHEMA that holds a problem.

    Args:
        index: the prompt's id.
    """
    shown = problem.demonstrations
    return {
        "data_source": source,
        "prompt": problem.prompt,
        "target": [{"role": "assistant", "content": shown[0]}] if shown else None,
        "target_lst": shown if len(shown) > 1 else None,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index, "level": problem.level},
    }


@contextmanager
def problem_file(path: Path) -> Iterator[Callable[[Sequence[dict[str, Any]]], None]]:
    """Yield a function that appends rows of SCHEMA to a parquet file; the file appears whole when the block succeeds.

    Pages carry checksums: a reader can tell a damaged one.
    """
    waiting: list[dict[str, Any]] = []
    with whole(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, write_page_checksum=True) as writer:

        def append(rows: Sequence[dict[str, Any]]) -> None:
            waiting.extend(rows)
            while len(waiting) >= ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(waiting[:ROW_GROUP], schema=SCHEMA))
                del waiting[:ROW_GROUP]

        yield append
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=SCHEMA))


def write_problems(path: Path, problems: Iterable[Problem], source: str, split: str) -> int:
    """Write problems as a parquet file, whole, and return how many there were."""
    number = 0
    with problem_file(path) as append:
        for number, problem in enumerate(problems, start=1):
            append([schema_row(problem, source, split, f"{source}-{split}-{number - 1}")])
    return number
