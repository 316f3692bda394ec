"""Bytes that a receiver maps and reads in place: another process's memory on this host, or files.

A sender's segment of memory is anonymous (``memfd_create``); receivers of the same user open it through
``/proc/<pid>/fd/<fd>``. Nothing appears in /dev/shm, so its size limit (64 MB in many containers) does not apply, and the
kernel frees the memory when the last process that maps it is gone, however it died.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hpt.checksum import copy_and_hash
from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.manifest import Piece

ALIGNMENT = 64
"""Bytes; pieces start at multiples of it, so any dtype can be viewed in place."""


def aligned(position: int) -> int:
    """Return the next allowed start of a piece at or after a position."""
    return -(-position // ALIGNMENT) * ALIGNMENT


class Segment:
    """Memory that this process fills and others read."""

    def __init__(self, nbytes: int) -> None:
        """Reserve `nbytes` bytes.

        Raises:
            TransferError: the host has not that much memory left.
        """
        self._nbytes = nbytes
        self._fd = os.memfd_create("megatron_hpt_weights")
        try:
            os.posix_fallocate(self._fd, 0, max(nbytes, 1))
        except OSError as error:
            os.close(self._fd)
            raise TransferError(f"cannot reserve {nbytes} bytes of shared memory for weights: {error}") from None
        self._map = mmap.mmap(self._fd, max(nbytes, 1))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def put(self, position: int, value: Tensor) -> int:
        """Copy `value` to byte `position`; return its checksum."""
        return copy_and_hash(self.bytes[position : position + value.nbytes].view(value.dtype).view(value.shape), value)

    @property
    def source(self) -> dict[str, Any]:
        """How a receiver finds the segment."""
        return {"path": f"/proc/{os.getpid()}/fd/{self._fd}", "nbytes": self._nbytes, "owner": f"process {os.getpid()}"}

    def close(self) -> None:
        """Give the memory up; receivers that still map it keep it alive until they close."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map.close()
        os.close(self._fd)


def laid_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return aligned positions of boxes of these many bytes one after the other, and the bytes of all."""
    positions, position = [], 0
    for nbytes in sizes:
        positions.append(position)
        position = aligned(position + nbytes)
    return positions, position


class SegmentSink:
    """Sending end of ``shared_memory``: one segment, overwritten by every version."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.positions, nbytes = laid_out(sizes)
        self._segment = Segment(nbytes)
        self.source = self._segment.source

    def put(self, index: int, value: Tensor) -> int:
        """Copy a box into the segment, and return its checksum."""
        return self._segment.put(self.positions[index], value)

    def commit(self, version: int) -> None:
        """Do nothing: receivers read in place."""

    def close(self) -> None:
        """Free the segment."""
        self._segment.close()


class MappedBytes:
    """The bytes of one source, mapped read-only."""

    def __init__(self, source: dict[str, Any]) -> None:
        """Map the source.

        Raises:
            TransferError: the owner is gone or belongs to another user, or there are fewer bytes than it said.
        """
        self._owner, nbytes = source.get("owner", source["path"]), int(source["nbytes"])
        try:
            with open(source["path"], "rb") as file:
                self._map = mmap.mmap(file.fileno(), max(nbytes, 1), access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise TransferError(f"cannot map the weights of {self._owner}: {error}") from None
        with warnings.catch_warnings():  # torch warns that the buffer is read-only, which is what we want
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, position: int, nbytes: int) -> Tensor:
        """Return [nbytes] uint8 in place.

        Raises:
            TransferError: the range reaches beyond the source's end.
        """
        if position < 0 or position + nbytes > len(self._bytes):
            raise TransferError(
                f"a piece at byte {position} + {nbytes} lies beyond the {len(self._bytes)} bytes of {self._owner}"
            )
        return self._bytes[position : position + nbytes]


class Mapped:
    """Receiving end: it reads the senders' bytes in place."""

    whole = True

    def __init__(self, sources: Sequence[dict[str, Any]], pieces: Sequence[tuple[int, Piece]]) -> None:
        """Map the sources of this rank's pieces.

        Raises:
            TransferError: a source is gone.
        """
        self._pieces = list(pieces)
        self._bytes = {number: MappedBytes(sources[number]) for number in sorted({piece.source for _, piece in pieces})}

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """Yield all pieces at once: everything is within reach."""
        yield from self._pieces

    def view(self, number: int, piece: Piece) -> Tensor:
        """Return the bytes of a piece, [nbytes] uint8, in place."""
        return self._bytes[piece.source].view(piece.position, piece.nbytes)

    def close(self) -> None:
        """Unmap all sources."""
        self._bytes.clear()
