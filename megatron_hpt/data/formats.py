"""Reading files piece by piece: parquet by row group, JSONL as one block. Nothing here holds a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from megatron_hpt.data.locations import Location
from megatron_hpt.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
BATCH_BYTES = 4 << 20
"""Of rows that are in memory at one time, roughly."""
_READ_BYTES = 1 << 20
_OPEN_FILES = 8


@dataclass(frozen=True)
class Block:
    """Rows that are read from their first one on: a row group, or a file of lines."""

    location: Location
    index: int
    """Of the row group."""
    first: int
    """Row of the file that it begins with."""
    rows: int
    bytes: int
    """Of the columns that are read, uncompressed, as far as the file tells."""

    @property
    def batch_rows(self) -> int:
        """Rows of one batch in memory."""
        return max(1, min(8192, BATCH_BYTES * self.rows // max(1, self.bytes)))

    def place(self, row: int) -> str:
        """How messages call a row."""
        return f"{self.location.name}, row {self.first + row}"


class Format(Protocol):
    """A kind of file."""

    def schema(self, location: Location) -> pa.Schema:
        """Columns of the file."""

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """The rows of the file, in order."""

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a block."""


class Parquet:
    """Row groups; only the columns that are asked for are read. A few files stay open: reading a footer takes its time."""

    def __init__(self) -> None:
        self._file = lru_cache(_OPEN_FILES)(_open_parquet)

    def schema(self, location: Location) -> pa.Schema:
        """From the footer."""
        return self._file(location).schema_arrow

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """One a row group, empty ones left out."""
        metadata, blocks, first = self._file(location).metadata, [], 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunks = (group.column(number) for number in range(group.num_columns))
            size = sum(c.total_uncompressed_size for c in chunks if _is_below(c.path_in_schema, columns))
            if group.num_rows:
                blocks.append(Block(location, index, first, group.num_rows, size))
            first += group.num_rows
        return blocks

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Streamed through the pages of the row group."""
        reader = self._file(block.location)
        # One thread: several decode several columns of a row group at a time, and hold that much more.
        yield from reader.iter_batches(block.batch_rows, row_groups=[block.index], columns=list(columns), use_threads=False)


def _is_below(path: str, columns: Sequence[str]) -> bool:
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _open_parquet(location: Location) -> pq.ParquetFile:
    return pq.ParquetFile(location.open(), pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True)


class Lines:
    """One JSON object a line. There is no way to a line but through those before it."""

    def schema(self, location: Location) -> pa.Schema:
        """As the first lines have it; later ones must agree."""
        return self._reader(location).schema

    def blocks(self, location: Location, columns: Sequence[str]) -> list[Block]:
        """The whole file."""
        with location.open() as file:
            rows, rest = 0, b""
            while data := file.read(_READ_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                rows += sum(not line.isspace() and line != b"" for line in lines)
        rows += bool(rest.strip())
        return [Block(location, 0, 0, rows, location.size)] if rows else []

    def batches(self, block: Block, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Parsed as they are read."""
        names = {column.partition(".")[0] for column in columns}
        try:
            for batch in self._reader(block.location):
                yield batch.select([name for name in batch.schema.names if name in names])
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(
                f"{error}; from here on, a line is no JSON or has a field or a type that the first lines have not "
                "(tools/prepare_data.py columns makes parquet of such a file)"
            ) from None

    @staticmethod
    def _reader(location: Location) -> pj.JSONStreamingReader:
        parse = pj.ParseOptions(explicit_schema=pa.schema([("target", MESSAGES)]))  # none may be in the first lines
        return pj.open_json(location.open(), pj.ReadOptions(use_threads=False, block_size=BATCH_BYTES), parse)


FORMATS: dict[str, Callable[[], Format]] = {"parquet": Parquet, "JSONL": Lines}


def format_of(location: Location) -> str:
    """By the name's suffix; a file without a known one is parquet."""
    return "JSONL" if location.path.endswith(".jsonl") else "parquet"


def rows_of(form: Format, block: Block, columns: Sequence[str], skip: int = 0) -> Iterator[pa.RecordBatch]:
    """The rows of a block after its first `skip` ones.

    Raises:
        DataError: they cannot be read; names file, row group and row.
    """
    done = 0
    try:
        for batch in form.batches(block, columns):
            before, done = done, done + batch.num_rows
            if done > skip:
                yield batch.slice(max(0, skip - before))
    except (pa.ArrowException, OSError) as error:
        where = f"{block.place(done)} (in row group {block.index}, rows {block.first} to {block.first + block.rows - 1})"
        raise DataError(f"{where}: cannot be read: {error}") from None
    if done != block.rows:
        raise DataError(f"{block.location.name}: {block.rows} rows were announced, {done} are there; was it changed meanwhile?")
