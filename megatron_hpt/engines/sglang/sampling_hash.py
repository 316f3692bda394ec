"""The hash behind SGLang's seeded sampling, in plain torch: MurmurHash3 (x86, 32 bits) of 16 bytes.

SGLang 0.5.23 has it as a Triton kernel and in a CPU kernel package that is on no registry
(sglang/kernels/ops/sampling/murmur_hash.py). Algorithm: Austin Appleby, MurmurHash3, public domain.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_LENGTH = 16
"""Bytes hashed: seed (8), position (4), column (4)."""


def hash32(seed: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
    """Hash every (seed, position, column).

    Args:
        seed: [rows], 64-bit integers.
        positions: [rows] integers below 2^32.
        columns: [columns] integers below 2^32.

    Returns:
        [rows, columns] int64, each below 2^32.
    """
    # int64 products wrap modulo 2^64, whose low 32 bits are those of the exact product.
    seed, positions, columns = seed.view(torch.int64)[:, None], positions.long()[:, None], columns.long()[None, :]
    state = torch.zeros_like(seed)
    for block in (seed & _WORD, (seed >> 32) & _WORD, positions & _WORD, columns & _WORD):
        state = _mix(state, block)
    return _finish(state ^ _LENGTH)


def _rotated(word: Tensor, bits: int) -> Tensor:
    return ((word << bits) & _WORD) | (word >> (32 - bits))


def _mix(state: Tensor, block: Tensor) -> Tensor:
    block = _rotated((block * 0xCC9E2D51) & _WORD, 15)
    state = state ^ ((block * 0x1B873593) & _WORD)
    return (_rotated(state, 13) * 5 + 0xE6546B64) & _WORD


def _finish(state: Tensor) -> Tensor:
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _WORD
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _WORD
    return state ^ (state >> 16)
