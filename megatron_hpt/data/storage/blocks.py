"""The part of a file that is read together."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hpt.data.storage.locations import Location

BATCH_BYTES = 4 << 20
"""Bytes of the rows of one batch, roughly."""
OPEN_FILES = 8
"""How many files of a format stay open."""


@dataclass(frozen=True)
class Block:
    """Rows that are read from their first one on: a row group, or a range of bytes of a file of lines."""

    location: Location
    index: int
    """The number of the row group, or the offset of the first byte."""
    first: int
    """The row of the file that the block begins with."""
    rows: int
    bytes: int
    """Uncompressed size of the columns that are read, as far as the file tells."""
    part: str
    """How messages call the block within its file."""

    @property
    def batch_rows(self) -> int:
        """How many rows of the block one batch has."""
        return max(1, min(8192, BATCH_BYTES * self.rows // max(1, self.bytes)))

    def place(self, row: int) -> str:
        """How messages call a row."""
        return f"{self.location.name}, row {self.first + row}"
