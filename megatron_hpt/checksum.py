"""Checksums of weights, at the speed of memory: xxHash3 (64 bits), seeded by where the bytes belong.

It finds what memory, sockets, disks and wrong offsets do; it is no signature. Copying and hashing go block by block, so
that the hash reads what the copy left in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

BLOCK = 1 << 20
"""Bytes copied at a time before they are hashed."""


def checksum(data: Any) -> int:
    """Hash of a contiguous buffer."""
    return xxhash.xxh3_64_intdigest(data)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, [n] uint8, in place."""
    return tensor.reshape(-1).view(torch.uint8)


def checksum_of(tensor: Tensor) -> int:
    """Hash of a tensor's bytes, row-major; device tensors are copied to the host."""
    flat = tensor.contiguous().cpu().reshape(-1)
    return checksum(as_bytes(flat if flat.stride(-1) == 1 else flat.repeat(1)).numpy())  # one element may have any stride


def copy_and_hash(target: Tensor, source: Tensor) -> int:
    """Copy `source` into `target` and hash it on the way.

    Args:
        target: contiguous, of the same shape and dtype; what lies on a device is copied to the host to be hashed.
        source: any layout, any device.
    """
    if target.device.type != "cpu":
        target.copy_(source)
        return checksum_of(target)
    if not source.is_contiguous() or source.device.type != "cpu" or target.nbytes <= BLOCK:
        target.copy_(source)
        return checksum(as_bytes(target).numpy())
    hasher, into, of = xxhash.xxh3_64(), as_bytes(target), as_bytes(source)
    readable = into.numpy()
    for start in range(0, len(into), BLOCK):
        into[start : start + BLOCK].copy_(of[start : start + BLOCK])
        hasher.update(readable[start : start + BLOCK])
    return hasher.intdigest()
