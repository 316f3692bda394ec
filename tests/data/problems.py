"""Data of the tests: small files in the project's schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ALPHABET = "0123456789+=,"


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A sum; its id is ``p<number>``."""
    return {
        "prompt": [{"role": "user", "content": f"{number}+1"}],
        "target": [{"role": "assistant", "content": f"{number}+1={number + 1},\\boxed{{{number + 1}}}"}],
        "reward_model": {"style": "rule", "ground_truth": str(number + 1)},
        "extra_info": {"split": "train", "index": f"p{number}"},
        "data_source": "even" if number % 2 == 0 else "odd",
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]], group: int = 1000) -> str:
    """A parquet file with row groups of `group` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return str(path)
