"""The ledger: one Arrow file a step. It can be read with pyarrow or DuckDB, and trained again without engines."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from megatron_hpt.data.files import whole
from megatron_hpt.data.rows import Batch, from_table, to_table
from megatron_hpt.errors import DataError


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
        path = self.path(step)
        try:
            with pa.memory_map(str(path)) as source:
                return from_table(pa.ipc.open_file(source).read_all())
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"{path}: cannot be read as a batch: {error}") from None
