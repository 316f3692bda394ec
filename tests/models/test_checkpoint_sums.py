"""Checksums of files in blocks: every changed byte is found, by who reads its block; many write at once."""

import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.models import checkpoint_sums
from megatron_hpt.models.checkpoints import checksums, damage, mark_damaged, record


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_sums, "BLOCK", 64)


def write(folder: Path, name: str, size: int) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(random.Random(name).randbytes(size))


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << byte % 8
    path.write_bytes(data)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_any_flipped_bit_is_found_and_its_place_told(tmp_path: Path, size: int) -> None:
    write(tmp_path, "a", size)
    written = {"a": checkpoint_sums.of_file(tmp_path / "a")}
    assert checkpoint_sums.differing(tmp_path, written) is None
    for byte in {0, size // 2, size - 1}:
        flip(tmp_path / "a", byte)
        start = byte // 64 * 64
        assert checkpoint_sums.differing(tmp_path, written) == (
            f"a: bytes {start} to {start + 64} are not what was written (checksums differ)"
        )
        assert checkpoint_sums.differing(tmp_path, written, {"a": checkpoint_sums.touched(byte, 1)}) is not None
        others = [number for number in range(-(-size // 64)) if number != byte // 64]
        assert checkpoint_sums.differing(tmp_path, written, {"a": others}) is None
        flip(tmp_path / "a", byte)


@given(st.integers(0, 10_000), st.integers(0, 1000))
def test_the_blocks_of_a_part_hold_it(offset: int, length: int) -> None:
    blocks = checkpoint_sums.touched(offset, length)
    assert all(
        block * checkpoint_sums.BLOCK < offset + length and (block + 1) * checkpoint_sums.BLOCK > offset for block in blocks
    )
    assert not length or (
        blocks[0] * checkpoint_sums.BLOCK <= offset
        and blocks[-1] * checkpoint_sums.BLOCK + checkpoint_sums.BLOCK >= offset + length
    )


def note_own(folder: Path, writer: int) -> None:
    name = f"__{writer}_0.distcp"
    write(folder, name, 100 + writer)
    checkpoint_sums.note(folder, writer, [name])


def test_many_writers_at_once_and_what_nobody_noted(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(note_own, [tmp_path] * 12, range(12)))
    write(tmp_path, "hf/config.json", 30)
    (tmp_path / "empty").touch()
    record(tmp_path, {"step": 3})
    found = checksums(tmp_path)
    assert found is not None
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert sorted([*found, "megatron_hpt.json"]) == names  # no notes are left
    assert checkpoint_sums.differing(tmp_path, found) is None
    assert damage(tmp_path) is None


def test_small_files_are_looked_at_at_once_and_large_ones_when_they_are_read(tmp_path: Path) -> None:
    write(tmp_path, "common.pt", 60)
    write(tmp_path, "__0_0.distcp", 1000)
    record(tmp_path, {"step": 3})
    flip(tmp_path / "__0_0.distcp", 500)
    assert damage(tmp_path) is None
    flip(tmp_path / "common.pt", 7)
    assert str(damage(tmp_path)).startswith("common.pt: bytes 0 to 64")
    flip(tmp_path / "common.pt", 7)
    mark_damaged(tmp_path, "__0_0.distcp: bytes 448 to 512")  # by who has read it
    assert damage(tmp_path) == "__0_0.distcp: bytes 448 to 512"
