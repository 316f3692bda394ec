"""The ledger: one Arrow file a step. It can be read with pyarrow or DuckDB, and trained again without engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_hpt.batch.rows import Batch, from_schema, from_table, to_table
from megatron_hpt.errors import DataError
from megatron_hpt.files import whole


class Ledger:
    """Batches of a run, by step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """File of a step."""
        return self.folder / f"step_{step:06d}.arrow"

    def has(self, step: int) -> bool:
        """The step's batch is there, whole."""
        return self.path(step).is_file()

    def write(self, batch: Batch) -> None:
        """Write a batch whole, then put it into place."""
        table = to_table(batch)
        with whole(self.path(batch.step)) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    def read(self, step: int) -> Batch:
        """Memory-map a batch.

        Raises:
            DataError: missing or damaged; names the file.
        """
        return self._open(step, lambda reader: from_table(reader.read_all()))

    def read_meta(self, step: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The gate's decisions and the metrics of a batch, without its rows.

        Raises:
            DataError: missing or damaged; names the file.
        """
        return self._open(step, lambda reader: from_schema(reader.schema))

    def select(self, step: int, groups: Collection[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of the rows of some groups; the others are not read.

        Raises:
            DataError: missing or damaged; names the file.
        """

        def use(reader: pa.ipc.RecordBatchFileReader) -> list[dict[str, Any]]:
            table = reader.read_all()
            chosen = pc.is_in(table["group"], value_set=pa.array(groups, pa.int32()))
            return table.select(columns).filter(chosen).to_pylist()

        return self._open(step, use)

    def steps(self) -> list[int]:
        """Steps whose batches are there, in order."""
        matches = (re.fullmatch(r"step_(\d{6,})\.arrow", path.name) for path in self.folder.glob("step_*.arrow"))
        return sorted(int(match[1]) for match in matches if match)

    def _open(self, step: int, use: Callable[[pa.ipc.RecordBatchFileReader], Any]) -> Any:
        path = self.path(step)
        try:
            with pa.memory_map(str(path)) as source:
                return use(pa.ipc.open_file(source))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path}: cannot be read as a batch: {error}") from None
