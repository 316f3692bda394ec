"""The ledger: one Arrow file a step, which pyarrow and DuckDB read, and which can be trained again without engines.

The coordinator writes a step's batch, and every trainer rank reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_hpt.batch.rows import Batch, from_schema, from_table, schema_of, to_parts
from megatron_hpt.errors import DataError
from megatron_hpt.files import whole


class Ledger:
    """The batches of a run by step, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Return where the file of a step lies, whether it is there or not."""
        return self.folder / f"step_{step:06d}.arrow"

    def has(self, step: int) -> bool:
        """Return whether the step's batch is there; a file of this name is whole."""
        return self.path(step).is_file()

    def write(self, batch: Batch) -> None:
        """Write a batch under another name and rename it, so that no half-written file is ever read."""
        with whole(self.path(batch.step)) as temporary, pa.ipc.new_file(str(temporary), schema_of(batch)) as writer:
            for part in to_parts(batch.rows):
                writer.write_batch(part)

    def read(self, step: int) -> Batch:
        """Read a batch with all its rows, whose arrays are read from the file when they are used (`rows`).

        Raises:
            DataError: the file is missing or damaged; names it.
        """
        return self._open(step, lambda reader: from_table(reader.read_all()))

    def read_meta(self, step: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Read the gate's decisions and the metrics of a batch, without its rows.

        Raises:
            DataError: the file is missing or damaged; names it.
        """
        return self._open(step, lambda reader: from_schema(reader.schema))

    def select(self, step: int, groups: Collection[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Read some columns of the rows of some groups. The file is memory-mapped, so other rows and columns are not read.

        Raises:
            DataError: the file is missing or damaged; names it.
        """

        def chosen_rows(reader: pa.ipc.RecordBatchFileReader) -> list[dict[str, Any]]:
            table = reader.read_all()
            is_chosen = pc.is_in(table["group"], value_set=pa.array(groups, pa.int32()))
            return table.select(columns).filter(is_chosen).to_pylist()

        return self._open(step, chosen_rows)

    def steps(self) -> list[int]:
        """Return the steps whose batches are there, in rising order."""
        matches = (re.fullmatch(r"step_(\d{6,})\.arrow", path.name) for path in self.folder.glob("step_*.arrow"))
        return sorted(int(match[1]) for match in matches if match)

    def _open(self, step: int, use: Callable[[pa.ipc.RecordBatchFileReader], Any]) -> Any:
        path = self.path(step)
        try:
            with pa.memory_map(str(path)) as source:
                return use(pa.ipc.open_file(source))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path}: cannot be read as a batch: {error}") from None
