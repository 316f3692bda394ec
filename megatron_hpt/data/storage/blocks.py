"""The part of a file that is read together."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_hpt.data.storage.locations import Location

BATCH_BYTES = 4 << 20
"""Of rows that are in memory at one time, roughly."""
OPEN_FILES = 8
"""Of a format, at one time."""


@dataclass(frozen=True)
class Block:
    """Rows that are read from their first one on: a row group, or a range of bytes of a file of lines."""

    location: Location
    index: int
    """Of the row group, or of the first byte."""
    first: int
    """Row of the file that it begins with."""
    rows: int
    bytes: int
    """Of the columns that are read, uncompressed, as far as the file tells."""
    part: str
    """How messages call the block within its file."""

    @property
    def batch_rows(self) -> int:
        """Rows of one batch in memory."""
        return max(1, min(8192, BATCH_BYTES * self.rows // max(1, self.bytes)))

    def place(self, row: int) -> str:
        """How messages call a row."""
        return f"{self.location.name}, row {self.first + row}"
