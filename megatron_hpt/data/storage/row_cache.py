"""Rows that are read in any order. Blocks are read once, in order, and their rows are kept in a scratch file without a name."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_hpt.errors import DataError

PIECE_BYTES = 128 << 10
"""Bytes of the rows that are written, and read back, together: one read brings a row and its neighbours."""


@dataclass
class _Pieces:
    """Where the rows of a block lie in the scratch file."""

    schema: pa.Schema
    first: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    rows: int = 0


class RowCache:
    """Arrow record batches of about `PIECE_BYTES` in one file, which is gone when the process is, however it ends.

    Rows are read by `pread` and not mapped: pages of a mapped file count as the process's memory, and a shuffled epoch
    touches all of them.
    """

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: on a disk with room for the rows uncompressed; None: the system's folder for temporary files.
        """
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (open as long as the cache)
        self._folder = folder or Path(tempfile.gettempdir())
        self._end = 0
        self._blocks: dict[Hashable, _Pieces] = {}

    def rows(self, block: Hashable) -> int:
        """Return how many rows of a block are here; they are its first ones."""
        return self._blocks[block].rows if block in self._blocks else 0

    def add(self, block: Hashable, batch: pa.RecordBatch) -> None:
        """Append a block's next rows.

        Raises:
            DataError: the disk is full.
        """
        pieces = self._blocks.setdefault(block, _Pieces(batch.schema))
        step = max(1, PIECE_BYTES * batch.num_rows // max(1, batch.nbytes))
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            buffer = piece.serialize()
            self._write(buffer)
            pieces.first.append(pieces.rows)
            pieces.offset.append(self._end)
            pieces.length.append(buffer.size)
            pieces.rows += piece.num_rows
            self._end += buffer.size

    def _write(self, buffer: pa.Buffer) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as error:
            raise DataError(
                f"{self._folder}: the rows of the data set do not fit: {error}; they take their uncompressed size there"
            ) from None

    def row(self, block: Hashable, row: int) -> dict[str, Any]:
        """Read one row that is here."""
        pieces = self._blocks[block]
        at = bisect_right(pieces.first, row) - 1
        data = os.pread(self._file.fileno(), pieces.length[at], pieces.offset[at])
        return pa.ipc.read_record_batch(pa.py_buffer(data), pieces.schema).slice(row - pieces.first[at], 1).to_pylist()[0]
