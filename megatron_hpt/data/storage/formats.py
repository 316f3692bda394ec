"""Reading files piece by piece: parquet by row group, JSONL by ranges of bytes. Nothing here holds a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.storage.blocks import OPEN_FILES, Block
from megatron_hpt.data.storage.lines import Lines
from megatron_hpt.data.storage.locations import Location
from megatron_hpt.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_READ_BYTES = 1 << 20


class FileFormat(Protocol):
    """A kind of file that rows can be read from. A `ProblemSet` has one of each kind, for all files of that kind."""

    def schema(self, location: Location) -> pa.Schema:
        """Return the columns of the file."""

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """Cut the file into blocks, in order. `columns` are those that will be read."""

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a block in batches, in order."""

    def restored(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row of a batch in the form that its file has."""


class Parquet:
    """Parquet by row group; only needed columns are read. A few files stay open: reading a footer takes its time."""

    def __init__(self) -> None:
        self._file = lru_cache(OPEN_FILES)(_open_parquet)

    def schema(self, location: Location) -> pa.Schema:
        """Read the columns from the footer."""
        return self._file(location).schema_arrow

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """Make one block of each row group that is not empty."""
        metadata, blocks, first = self._file(location).metadata, [], 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunks = (group.column(number) for number in range(group.num_columns))
            size = sum(c.total_uncompressed_size for c in chunks if _is_below(c.path_in_schema, columns))
            if group.num_rows:
                blocks.append(Block(location, index, first, group.num_rows, size, f"row group {index}"))
            first += group.num_rows
        return blocks

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Stream through the pages of the row group."""
        reader = self._file(block.location)
        # One thread: several decode several columns of a row group at a time, and hold that much more.
        yield from reader.iter_batches(block.batch_rows, row_groups=[block.index], columns=list(columns), use_threads=False)

    def restored(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row as it is."""
        return row


def _is_below(path: str, columns: Sequence[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _open_parquet(location: Location) -> pq.ParquetFile:
    return open_parquet(location.open())


def open_parquet(source: Path | BinaryIO) -> pq.ParquetFile:
    """Open a parquet file that is read piece by piece: a MiB of a column ahead, the pages' checksums compared."""
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)


FORMATS: dict[str, Callable[[], FileFormat]] = {"parquet": Parquet, "JSONL": Lines}
LINES = (".jsonl", ".json", ".ndjson")
"""Suffixes of JSONL."""


def format_of(location: Location) -> str:
    """Tell the format by the name's suffix; a file without a known suffix is taken for parquet."""
    return "JSONL" if location.path.lower().endswith(LINES) else "parquet"


def rows_of(form: FileFormat, block: Block, columns: Sequence[str], skip: int = 0) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a block after its first `skip` ones.

    Raises:
        DataError: they cannot be read; names file, row group and row.
    """
    done = 0
    try:
        for batch in form.batches(block, columns):
            batch.validate(full=True)  # text is UTF-8, which parquet does not see to
            before, done = done, done + batch.num_rows
            if done > skip:
                yield batch.slice(max(0, skip - before))
    except (pa.ArrowException, OSError) as error:
        where = f"{block.place(done)} (in {block.part}, rows {block.first} to {block.first + block.rows - 1})"
        raise DataError(f"{where}: cannot be read: {error}") from None
    if done != block.rows:
        raise DataError(f"{block.location.name}: {block.rows} rows were announced, {done} are there; was it changed meanwhile?")
