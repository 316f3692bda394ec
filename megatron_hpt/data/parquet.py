"""Writing the project's parquet schema (docs/data.md)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.files import whole

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", _MESSAGES),
        ("target", _MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct([("split", pa.string()), ("index", pa.string())])),
    ]
)


@dataclass(frozen=True)
class Problem:
    """One problem as text."""

    question: str
    answer: str
    demonstration: str | None
    """A written-out solution whose last \\boxed{…} holds the answer."""


def write_problems(path: Path, problems: Iterable[Problem], source: str, split: str) -> int:
    """Write problems as a parquet file, whole; returns how many."""
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": problem.question}],
            "target": [{"role": "assistant", "content": problem.demonstration}] if problem.demonstration else None,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": f"{source}-{split}-{index}"},
        }
        for index, problem in enumerate(problems)
    ]
    with whole(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
    return len(rows)
