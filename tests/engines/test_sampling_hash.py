"""The hash behind SGLang's seeds, against the algorithm written out over bytes and its published values."""

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.engines.sglang.sampling_hash import hash32

WORD = 0xFFFFFFFF


def murmur3(data: bytes, seed: int = 0) -> int:
    """MurmurHash3_x86_32 of Austin Appleby's reference, in plain integers."""
    state, whole = seed, len(data) // 4 * 4
    for (block,) in struct.iter_unpack("<I", data[:whole]):
        state ^= scrambled(block)
        state = ((state << 13 | state >> 19) & WORD) * 5 + 0xE6546B64 & WORD
    if tail := data[whole:]:
        state ^= scrambled(int.from_bytes(tail, "little"))
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state = (state ^ state >> shift) * factor & WORD
    return state


def scrambled(block: int) -> int:
    block = block * 0xCC9E2D51 & WORD
    return (block << 15 | block >> 17) * 0x1B873593 & WORD


def test_the_written_out_algorithm_gives_the_published_values() -> None:
    assert murmur3(b"") == 0
    assert murmur3(b"test") == 0xBA6BD213
    assert murmur3(b"Hello, world!") == 0xC0363E43


@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=4),
    st.lists(st.integers(0, 200_000), min_size=1, max_size=5),
)
def test_every_seed_position_and_column(rows: list[tuple[int, int]], columns: list[int]) -> None:
    seeds, positions = (torch.tensor(side) for side in zip(*rows, strict=True))
    found = hash32(seeds.view(torch.uint64), positions, torch.tensor(columns))
    expected = [[murmur3(struct.pack("<qII", seed, position, c)) for c in columns] for seed, position in rows]
    assert found.tolist() == expected
