"""Shared memory between processes of one host, without a name.

A sender's segment is an anonymous memory file (``memfd_create``). Receivers of the same user open it through
``/proc/<pid>/fd/<fd>``. Nothing appears in /dev/shm, so its size limit (64 MB in many containers) does not apply, and
the kernel frees the memory when the last process that maps it is gone, however it died.
"""

from __future__ import annotations

import mmap
import os
import warnings

import torch
from torch import Tensor

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.manifest import Segment

ALIGNMENT = 64
"""Bytes; pieces start at multiples of it, so any dtype can be viewed in place."""


class SenderSegment:
    """Memory that this process fills and others read."""

    def __init__(self, nbytes: int) -> None:
        """Reserve `nbytes` bytes.

        Raises:
            TransferError: the host has not that much memory left.
        """
        self._fd = os.memfd_create("megatron_hpt_weights")
        try:
            os.posix_fallocate(self._fd, 0, max(nbytes, 1))
        except OSError as error:
            os.close(self._fd)
            raise TransferError(f"cannot reserve {nbytes} bytes of shared memory for weights: {error}") from None
        self._map = mmap.mmap(self._fd, max(nbytes, 1))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.description = Segment(pid=os.getpid(), fd=self._fd, nbytes=nbytes)

    def put(self, position: int, value: Tensor) -> memoryview:
        """Copy `value` to byte `position`; return the bytes as they now lie in the segment."""
        nbytes = value.numel() * value.element_size()
        self.bytes[position : position + nbytes].view(value.dtype).view(value.shape).copy_(value)
        return memoryview(self._map)[position : position + nbytes]

    def close(self) -> None:
        """Let go of the memory; receivers that still map it keep it alive until they close."""
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map.close()
        os.close(self._fd)


class ReceiverSegment:
    """Another process's segment, mapped read-only."""

    def __init__(self, segment: Segment) -> None:
        """Map `segment`.

        Raises:
            TransferError: the sender is gone or belongs to another user, or its memory is shorter than it said.
        """
        try:
            with open(segment.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), max(segment.nbytes, 1), access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise TransferError(f"cannot map the weights of process {segment.pid}: {error}") from None
        with warnings.catch_warnings():  # torch warns that the buffer is read-only, which is what we want
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def view(self, position: int, nbytes: int) -> memoryview:
        """Bytes as a buffer, in place."""
        return memoryview(self._map)[position : position + nbytes]

    def tensor(self, position: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Bytes as a tensor, in place."""
        return self.bytes[position : position + nbytes].view(dtype).view(shape)


def aligned(position: int) -> int:
    """The next allowed start of a piece."""
    return -(-position // ALIGNMENT) * ALIGNMENT
