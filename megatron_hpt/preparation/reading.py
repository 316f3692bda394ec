"""Reading the records of parquet and JSON files, with one batch in memory at a time.

A damaged file is an error; a damaged record is a record that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.storage import jsonl
from megatron_hpt.data.storage.columns import check_names
from megatron_hpt.data.storage.formats import open_parquet
from megatron_hpt.data.storage.locations import is_hidden
from megatron_hpt.data.storage.splits import check_one_split, split_of
from megatron_hpt.errors import DataError, did_you_mean
from megatron_hpt.preparation.fields import Unfit, beginnings

T = TypeVar("T")
BATCH = 1024
SUFFIXES = (".parquet", ".json", ".jsonl")
_START = 1 << 20
"""Bytes of a JSON file that say what kind it is."""


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    file: str
    row: int
    """Counted from 0; in JSON Lines by lines."""
    fields: dict[str, Any]
    damage: str = ""
    """Why the record has no fields; empty: it has."""

    @property
    def where(self) -> str:
        """How messages call the record."""
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True)
class RecordBatch:
    """Records, and how many bytes of the input they are."""

    records: list[Record]
    nbytes: int


@dataclass(frozen=True)
class Files:
    """Files that are read one after the other."""

    paths: tuple[Path, ...]

    @property
    def split(self) -> str | None:
        """The split that the names of all files and of their folders name; None if they name none, or several."""
        named = {split_of(f"{path.absolute().parent.name}/{path.name}") for path in self.paths}
        return named.pop() if len(named) == 1 else None

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def batches(self, columns: Collection[str] | None = None) -> Iterator[RecordBatch]:
        """Yield all records in batches.

        Args:
            columns: the columns that are needed; others of a parquet file stay on the disk. None: all columns.

        Raises:
            DataError: with the file, and the rows where that can be said: not readable, damaged, empty.
        """
        for path in self.paths:
            empty = True
            for batch in (_parquet if path.suffix == ".parquet" else _json)(path, columns):
                empty &= not batch.records
                yield batch
            if empty:
                raise DataError(f"{path}: has no rows")

    def values(self, read: Callable[[dict[str, Any]], T], columns: Collection[str] | None = None) -> Iterator[tuple[Record, T]]:
        """Yield all records, each with what `read` makes of its fields; for sets of which no record may be left out.

        Raises:
            DataError: as `batches`; and with file and row where a record is damaged or `read` raises Unfit.
        """
        for record in (record for batch in self.batches(columns) for record in batch.records):
            if record.damage:
                raise DataError(f"{record.where}: {record.damage}")
            try:
                value = read(record.fields)
            except Unfit as why:
                raise DataError(f"{record.where}, {why}") from None
            yield record, value

    def require(self, columns: Collection[str]) -> None:
        """Check that every parquet file has these columns, or those that they are fields of. JSON is checked when it is read.

        Raises:
            DataError: names the file and what it has.
        """
        for path in self.paths:
            if path.suffix == ".parquet":
                has = _open(path).schema_arrow.names
                for name in columns:
                    if not any(beginning in has for beginning in beginnings(name)):
                        raise DataError(f"{path}: no column {name!r}; it has {', '.join(has)}{did_you_mean(name, has)}")


def local_files(source: Path) -> Files:
    """Return a file, or the files of a folder in the order of their names.

    Raises:
        DataError: nothing there that can be read, or files of several splits.
    """
    if source.is_dir():
        paths = files_below(source)
        if not paths:
            raise DataError(f"{source}: no file in it ends in {', '.join(SUFFIXES)}")
        return one_split(str(source), source, paths)
    if not source.is_file():
        raise DataError(f"{source}: no such file or folder")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{source}: not a kind of file that is read; allowed: {', '.join(SUFFIXES)}")
    return Files((source,))


def files_below(folder: Path) -> list[Path]:
    """List what a folder and its folders have to read, by name; hidden files are left alone."""
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in found if not is_hidden(path.relative_to(folder).as_posix()))


def one_split(source: str, folder: Path, paths: Iterable[Path]) -> Files:
    """Return the files below a folder as one set. Files of several splits are refused: they would be mixed by oversight.

    Raises:
        DataError: names of several splits.
    """
    found = tuple(sorted(paths))
    check_one_split(source, [path.relative_to(folder).as_posix() for path in found])
    return Files(found)


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = open_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None
    check_names(file.schema_arrow, str(path))
    return file


def _parquet(path: Path, columns: Collection[str] | None) -> Iterator[RecordBatch]:
    file = _open(path)
    wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    row, bytes_per_row = 0, path.stat().st_size / max(1, file.metadata.num_rows)
    for group in range(file.num_row_groups):
        last = row + file.metadata.row_group(group).num_rows - 1
        batches = file.iter_batches(BATCH, row_groups=[group], columns=wanted)
        where = f"{path}, row group {group} (rows {row} to {last})"
        while (batch := _next(batches, where)) is not None:
            yield RecordBatch(_records(batch, path, row), round(bytes_per_row * len(batch)))
            row += len(batch)


def _next(batches: Iterator[pa.RecordBatch], where: str) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: damaged: {error}; fetch the file again") from None


def _records(batch: pa.RecordBatch, path: Path, first: int) -> list[Record]:
    try:
        return [Record(str(path), first + index, fields) for index, fields in enumerate(batch.to_pylist())]
    except UnicodeDecodeError as error:  # parquet holds any bytes: find the row
        damage = f"text that is not UTF-8: {error.reason} at byte {error.start}"
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:  # a date of the year 300,000
        damage = f"a value that Python has no like of: {error}"
    if len(batch) == 1:
        return [Record(str(path), first, {}, damage)]
    half = len(batch) // 2
    return _records(batch.slice(0, half), path, first) + _records(batch.slice(half), path, first + half)


def _json(path: Path, columns: Collection[str] | None) -> Iterator[RecordBatch]:
    """Read an array, or one record a line; the first character says which it is."""
    with path.open("rb") as file:
        start = file.read(_START)
        file.seek(0)
        try:
            jsonl.check_beginning(start)
            records = _lines(file, str(path))
        except jsonl.NotJson as why:
            if not jsonl.is_array(start):
                raise DataError(f"{path}: {why}") from None
            records = _array(file, str(path))
        done = 0
        while batch := list(islice(records, BATCH)):
            yield RecordBatch(batch, file.tell() - done)
            done = file.tell()


def _array(file: BinaryIO, path: str) -> Iterator[Record]:
    row = -1
    try:
        for row, found in enumerate(jsonl.elements(file)):
            yield _record(path, row, lambda found=found: jsonl.as_record(found))
    except jsonl.NotJson as why:
        raise DataError(f"{path}, row {row + 1}: damaged: {why}; fetch the file again") from None


def _lines(file: BinaryIO, path: str) -> Iterator[Record]:
    """Read one record a line; rows are numbered as lines are."""
    row = -1
    try:
        for row, line in enumerate(jsonl.lines(file)):
            if not jsonl.is_blank(line):
                yield _record(path, row, lambda line=line: jsonl.record(line))
    except jsonl.NotJson as why:
        raise DataError(f"{path}, row {row + 1}: {why}") from None


def _record(path: str, row: int, read: Callable[[], dict[str, Any]]) -> Record:
    try:
        return Record(path, row, read())
    except jsonl.NotJson as why:
        return Record(path, row, {}, str(why))
