"""Checksums of the files of a checkpoint, block by block: whoever reads a part checks the blocks of that part alone.

The sums are xxHash3 of 64 bits: it finds what disks, memory and networks do to bytes at rest, at the speed of memory; it is no
signature. Each writer notes the sums of its files (`note`), and the last one collects all notes (`collect`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import xxhash

BLOCK = 16 * 2**20
"""Bytes of a block."""
_PIECE = 2**20
_NOTES = ".sums"
_THREADS = 4
Sums = Mapping[str, list[str]]
"""File → the sum of each of its blocks, as hexadecimal digits."""


def of_file(path: Path) -> list[str]:
    """Return the sums of a file's blocks; an empty file has none."""
    with path.open("rb", buffering=0) as file:
        return [_of_block(file) for _ in range(-(-path.stat().st_size // BLOCK))]


def _of_block(file: IO[bytes]) -> str:
    """Return the sum of the next block, read in small pieces: threads keep the memory of large ones."""
    hasher, left = xxhash.xxh3_64(), BLOCK
    while left and (piece := file.read(min(left, _PIECE))):
        hasher.update(piece)
        left -= len(piece)
    return hasher.hexdigest()


def note(folder: Path, writer: int, names: Iterable[str]) -> None:
    """Note the sums of a writer's files right after they were written, while the bytes are still in memory."""
    notes = folder / _NOTES
    notes.mkdir(exist_ok=True)
    sums = {name: of_file(folder / name) for name in names}
    (notes / f"{writer}.json").write_text(json.dumps(sums), encoding="utf-8")


def collect(folder: Path) -> dict[str, list[str]]:
    """Return the sums of all files of a folder, as noted or else read now, and remove the notes."""
    noted: dict[str, list[str]] = {}
    for path in (folder / _NOTES).glob("*.json"):
        noted |= json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(folder / _NOTES, ignore_errors=True)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: noted.get(name) or of_file(folder / name) for name in names}


def differing(folder: Path, sums: Sums, blocks: Mapping[str, Iterable[int]] | None = None) -> str | None:
    """Return in words the first block whose bytes are not those that were written, or None where there is none.

    Args:
        blocks: file → numbers of the blocks to look at; None: all blocks of all files.

    Raises:
        OSError: a file cannot be read.
    """
    wanted = blocks if blocks is not None else {name: range(len(of_blocks)) for name, of_blocks in sums.items()}
    looked_at = [(name, number) for name, numbers in wanted.items() for number in numbers if number < len(sums.get(name, ()))]

    def is_wrong(block: tuple[str, int]) -> bool:
        name, number = block
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(number * BLOCK)
            return _of_block(file) != sums[name][number]

    with ThreadPoolExecutor(_THREADS) as threads:
        for (name, number), wrong in zip(looked_at, threads.map(is_wrong, looked_at), strict=True):
            if wrong:
                return f"{name}: bytes {number * BLOCK} to {(number + 1) * BLOCK} are not what was written (checksums differ)"
    return None


def touched(offset: int, length: int) -> range:
    """Return the numbers of the blocks that a part of a file lies in."""
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))
