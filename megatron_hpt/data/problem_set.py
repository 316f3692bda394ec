"""The rows of one data source. They are indexed by block, and any of them can be read in constant memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_hpt.data.order import BlockLayout
from megatron_hpt.data.storage.blocks import Block
from megatron_hpt.data.storage.columns import check_schema, readable
from megatron_hpt.data.storage.formats import FORMATS, FileFormat, format_of, rows_of
from megatron_hpt.data.storage.locations import Location, find
from megatron_hpt.data.storage.row_cache import RowCache
from megatron_hpt.errors import DataError

WINDOW_BYTES = 256 << 20
"""Bytes of the rows that are shuffled among each other; so much may have to be read before the first batch."""
LARGE_BYTES = WINDOW_BYTES // 4
"""A block above this is read only as far as it is needed, and is in several windows."""
_OPEN_BLOCKS = 4
_FOOTERS = 16


@dataclass(frozen=True)
class RawRow:
    """A row before it is tokenised."""

    fields: dict[str, Any]
    where: str
    """How messages call the row."""
    default_id: str

    @property
    def prompt_id(self) -> str:
        """The id of its prompt: ``extra_info.index``, or the default."""
        index = self._extra("index")
        return self.default_id if index is None else index

    @property
    def level(self) -> str | None:
        """How hard its problem is: ``extra_info.level``, where the data has one."""
        return self._extra("level")

    def _extra(self, name: str) -> str | None:
        value = (self.fields.get("extra_info") or {}).get(name)
        return None if value is None else str(value)


class ProblemSet:
    """The files of one source. Training has one for every source of `data.train`, evaluation one for every held-out set."""

    def __init__(self, paths: str | Sequence[str], scratch: Path | None = None, prefix: str = "") -> None:
        """
        Args:
            paths: as `locations.find` takes them.
            scratch: folder for rows that have been read; None: the system's folder for temporary files.
            prefix: begins the ids of rows that have none of their own.

        Raises:
            DataError: no files, not of a known format, a column missing or of another type, no rows.
        """
        self.name = paths if isinstance(paths, str) else ", ".join(paths)
        self._formats: dict[str, FileFormat] = {name: form() for name, form in FORMATS.items()}
        self._scratch, self._prefix = scratch, prefix
        self._columns: dict[Location, Sequence[str]] = {}
        self.locations = find(paths)
        self._files = {location: place for place, location in enumerate(self.locations)}
        with ThreadPoolExecutor(_FOOTERS) as pool:  # far files answer late
            self.blocks = [block for blocks in pool.map(self._index, self.locations) for block in blocks]
        if not self.blocks:
            raise DataError(f"{self.name}: has no rows")
        self._firsts, rows = [], 0
        for block in self.blocks:
            self._firsts.append(rows)
            rows += block.rows
        self.rows = rows
        self._readers: dict[int, Iterator[pa.RecordBatch]] = {}

    def _index(self, location: Location) -> list[Block]:
        form = self._formats[format_of(location)]
        try:
            schema = form.schema(location)
            check_schema(schema, location.name)
            self._columns[location] = readable(schema)
            blocks = form.blocks(location, self._columns[location])
        except (pa.ArrowException, OSError) as error:
            kind = format_of(location)
            if kind == "parquet" and not location.path.lower().endswith(".parquet"):
                raise DataError(
                    f"{location.name}: not a kind of file that is read; allowed: *.parquet, and *.jsonl, *.json and *.ndjson "
                    "with one object a line, not compressed"
                ) from None
            raise DataError(f"{location.name}: not a readable {kind} file: {error}") from None
        return blocks

    @cached_property
    def _cache(self) -> RowCache:
        return RowCache(self._scratch)

    def batches(self, number: int, skip: int = 0, only: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a block after its first `skip` ones, in order.

        Args:
            only: the columns to read; None: all that prompts are made of.

        Raises:
            DataError: they cannot be read; names file, row group and row.
        """
        block = self.blocks[number]
        columns = self._columns[block.location]
        chosen = columns if only is None else [column for column in columns if column in only]
        return rows_of(self._formats[format_of(block.location)], block, chosen, skip)

    def row(self, index: int) -> RawRow:
        """Read a row.

        Raises:
            DataError: it cannot be read.
        """
        number = bisect_right(self._firsts, index) - 1
        row = index - self._firsts[number]
        self._bring(number, row)
        return self.raw(number, row, self._cache.row(number, row))

    def raw(self, number: int, row: int, fields: dict[str, Any]) -> RawRow:
        """Make a row of what was read of it, with its place for messages and its default id."""
        block = self.blocks[number]
        whole = self._formats[format_of(block.location)].restored(fields)
        return RawRow(whole, block.place(row), self.default_id(number, row))

    def default_id(self, number: int, row: int) -> str:
        """Return the id of a row that has none: its place in the file, behind the file's number if there are several files."""
        block = self.blocks[number]
        place = str(block.first + row)
        return self._prefix + (place if len(self.locations) == 1 else f"{self._files[block.location]}:{place}")

    def _bring(self, number: int, row: int) -> None:
        """Read a block until a row of it is in the cache; a block that is not large is read to its end."""
        block = self.blocks[number]
        wanted = row + 1 if block.bytes > LARGE_BYTES else block.rows
        while self._cache.rows(number) < wanted:
            self._cache.add(number, next(self._reader(number)))
        if self._cache.rows(number) == block.rows:
            self._readers.pop(number, None)

    def _reader(self, number: int) -> Iterator[pa.RecordBatch]:
        """Return the iterator that reads on behind the cached rows; a few are kept, since each holds pages of its block."""
        reader = self._readers.pop(number, None) or self.batches(number, skip=self._cache.rows(number))
        self._readers[number] = reader
        if len(self._readers) > _OPEN_BLOCKS:
            self._readers.pop(next(iter(self._readers)))
        return reader

    @property
    def layout(self) -> BlockLayout:
        """The rows by block, with so many windows that each has about `WINDOW_BYTES`."""
        parts = [
            (range(first, first + b.rows), b.bytes > LARGE_BYTES) for first, b in zip(self._firsts, self.blocks, strict=True)
        ]
        small, large = ([rows for rows, is_large in parts if is_large is kind] for kind in (False, True))
        windows = min(self.rows, -(-sum(block.bytes for block in self.blocks) // WINDOW_BYTES))
        return BlockLayout(small, large, max(1, windows if large else min(windows, len(small))))
