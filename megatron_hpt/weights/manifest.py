"""The manifest that travels with weights: what is where, in which box, with which checksum. Pure; imports no torch.

An engine loads nothing before the manifest has been checked: the pieces of every tensor must tile it exactly once, and
every expected tensor must be there.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hpt.errors import TransferError


@dataclass(frozen=True)
class Piece:
    """One box of one HF tensor inside one segment."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: str
    """torch dtype name, e.g. ``float32``."""
    offset: tuple[int, ...]
    """Start of the box in each dimension."""
    extent: tuple[int, ...]
    """Size of the box in each dimension."""
    segment: int
    """Index into `Manifest.segments`."""
    position: int
    """First byte in the segment."""
    nbytes: int
    crc32: int
    """CRC-32 of the piece's bytes."""


@dataclass(frozen=True)
class Segment:
    """A sender's memory, opened through ``/proc/<pid>/fd/<fd>``: it has no name, so it cannot outlive its processes."""

    pid: int
    fd: int
    nbytes: int

    @property
    def path(self) -> str:
        """Where a receiver on the same host opens it."""
        return f"/proc/{self.pid}/fd/{self.fd}"


@dataclass(frozen=True)
class Manifest:
    """Everything a receiver needs to take in one version whole."""

    version: int
    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for an HTTP body."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            TransferError: a field is missing or of the wrong kind.
        """
        try:
            pieces = tuple(
                Piece(**{**p, "shape": tuple(p["shape"]), "offset": tuple(p["offset"]), "extent": tuple(p["extent"])})
                for p in data["pieces"]
            )
            return cls(int(data["version"]), tuple(Segment(**s) for s in data["segments"]), pieces)
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"the weight manifest is malformed: {type(error).__name__}: {error}") from None

    def by_tensor(self) -> dict[str, list[Piece]]:
        """Pieces of each tensor, in the order of their boxes."""
        tensors: dict[str, list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            tensors[piece.name].append(piece)
        return {name: sorted(pieces, key=lambda p: p.offset) for name, pieces in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)


def checksum(data: Any) -> int:
    """CRC-32 of a buffer: it catches what shared memory and sockets do wrong, at memory speed; it is no signature."""
    return zlib.crc32(data)


def check_complete(manifest: Manifest, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a manifest that does not hold exactly the expected tensors, each tiled exactly once.

    Args:
        expected: HF name → shape.

    Raises:
        TransferError: naming the first tensor that is missing, unknown, of another shape, or not tiled exactly once.
    """
    tensors = manifest.by_tensor()
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        raise TransferError(
            f"version {manifest.version}: {len(missing)} tensors missing ({_some(missing)}), "
            f"{len(unknown)} unknown ({_some(unknown)})"
        )
    for name, pieces in tensors.items():
        for piece in pieces:
            if piece.shape != tuple(expected[name]):
                raise TransferError(
                    f"version {manifest.version}: {name} has shape {piece.shape}, expected {tuple(expected[name])}"
                )
        _check_tiling(manifest.version, name, pieces)


def _check_tiling(version: int, name: str, pieces: list[Piece]) -> None:
    shape = pieces[0].shape
    for piece in pieces:
        inside = all(o >= 0 and o + e <= n for o, e, n in zip(piece.offset, piece.extent, shape, strict=True))
        if not inside or piece.dtype != pieces[0].dtype:
            raise TransferError(
                f"version {version}: {name}: a piece at {piece.offset} + {piece.extent} does not fit {shape} {pieces[0].dtype}"
            )
    # Boxes inside the tensor that do not overlap and have its volume tile it.
    if any(_overlap(a, b) for i, a in enumerate(pieces) for b in pieces[i + 1 :]):
        raise TransferError(f"version {version}: {name}: two pieces overlap")
    if sum(math.prod(p.extent) for p in pieces) != math.prod(shape):
        raise TransferError(f"version {version}: {name}: its pieces do not cover {shape}")


def _overlap(a: Piece, b: Piece) -> bool:
    return all(ao < bo + be and bo < ao + ae for ao, ae, bo, be in zip(a.offset, a.extent, b.offset, b.extent, strict=True))


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "") if names else "none"
