"""Checksums of the files of a checkpoint, block by block: who reads a part checks the blocks of that part alone.

xxHash3 (64 bits): it finds what disks, memory and networks do to bytes at rest, at the speed of memory; it is no signature.
Whoever writes a file notes its sums, beside the other writers; the last one collects them.
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
"""Bytes that have one sum."""
_PIECE = 2**20
_NOTES = ".sums"
_THREADS = 4
Sums = Mapping[str, list[str]]
"""File → the sum of each of its blocks, as hexadecimal digits."""


def of_file(path: Path) -> list[str]:
    """The sums of a file; of an empty one none."""
    with path.open("rb", buffering=0) as file:
        return [_of_block(file) for _ in range(-(-path.stat().st_size // BLOCK))]


def _of_block(file: IO[bytes]) -> str:
    """The sum of the block that comes next. It is read in small pieces: threads keep the memory of large ones."""
    hasher, left = xxhash.xxh3_64(), BLOCK
    while left and (piece := file.read(min(left, _PIECE))):
        hasher.update(piece)
        left -= len(piece)
    return hasher.hexdigest()


def note(folder: Path, writer: int, names: Iterable[str]) -> None:
    """Put down the sums of what a writer has written, right after it did, when the bytes are still in memory."""
    notes = folder / _NOTES
    notes.mkdir(exist_ok=True)
    sums = {name: of_file(folder / name) for name in names}
    (notes / f"{writer}.json").write_text(json.dumps(sums), encoding="utf-8")


def collect(folder: Path) -> dict[str, list[str]]:
    """All notes of a folder, which go; and the sums of files that nobody has noted."""
    found: dict[str, list[str]] = {}
    for path in (folder / _NOTES).glob("*.json"):
        found |= json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(folder / _NOTES, ignore_errors=True)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: found.get(name) or of_file(folder / name) for name in names}


def differing(folder: Path, sums: Sums, blocks: Mapping[str, Iterable[int]] | None = None) -> str | None:
    """The first block whose bytes are not those that were written, in words; None: there is none.

    Args:
        blocks: file → the numbers of the blocks that are looked at; None: all of all files.

    Raises:
        OSError: a file cannot be read.
    """
    wanted = blocks if blocks is not None else {name: range(len(own)) for name, own in sums.items()}
    looked_at = [(name, number) for name, numbers in wanted.items() for number in numbers if number < len(sums.get(name, ()))]

    def is_wrong(one: tuple[str, int]) -> bool:
        name, number = one
        with (folder / name).open("rb", buffering=0) as file:
            file.seek(number * BLOCK)
            return _of_block(file) != sums[name][number]

    with ThreadPoolExecutor(_THREADS) as threads:
        for (name, number), wrong in zip(looked_at, threads.map(is_wrong, looked_at), strict=True):
            if wrong:
                return f"{name}: bytes {number * BLOCK} to {(number + 1) * BLOCK} are not what was written (checksums differ)"
    return None


def touched(offset: int, length: int) -> range:
    """The blocks that a part of a file lies in."""
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))
