"""Checksums that tell a file from another one of the same name and number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from megatron_hpt.data.storage.locations import Location

PIECE_BYTES = 1 << 20
READ_BYTES = 1 << 30
"""How much is read of all files together; from a disk that takes a second or two."""
_READERS = 4


def fingerprints(locations: Sequence[Location]) -> list[str]:
    """Compute a checksum of each file, in hexadecimal.

    It covers the size of a file and, of files that are together no larger than `READ_BYTES`, every byte. Of more, each has its
    share of `READ_BYTES`: the first and the last MiB (where parquet keeps places, sizes, smallest and largest values of its row
    groups) and others evenly spread between them. Bytes that are changed in place elsewhere are not seen.
    """
    total = sum(location.size for location in locations)
    share = min(1.0, READ_BYTES / max(1, total))
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda location: _fingerprint(location, share), locations))


def offsets(size: int, share: float) -> list[int]:
    """Return the offsets of the pieces that are read of a file of `size` bytes."""
    pieces = -(-size // PIECE_BYTES)
    wanted = max(2, int(share * pieces))
    if wanted >= pieces:
        return [piece * PIECE_BYTES for piece in range(pieces)]
    return [(size - PIECE_BYTES) * number // (wanted - 1) for number in range(wanted)]


def _fingerprint(location: Location, share: float) -> str:
    digest = blake2b(str(location.size).encode(), digest_size=16)
    with location.open() as file:
        for offset in offsets(location.size, share):
            digest.update(file.read_at(min(PIECE_BYTES, location.size - offset), offset))
    return digest.hexdigest()
