"""Boxes of tensors: where a shard lies in the whole. Pure; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor with sides along its dimensions."""

    offset: tuple[int, ...]
    """Start in each dimension."""
    extent: tuple[int, ...]
    """Size in each dimension."""

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.extent)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(slice(o, o + e) for o, e in zip(self.offset, self.extent, strict=True))

    def common(self, other: Box) -> Box | None:
        """Return the box that two boxes of one tensor share, or None where they are apart."""
        start = tuple(map(max, self.offset, other.offset))
        end = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.extent, other.offset, other.extent, strict=True)]
        extent = tuple(e - s for s, e in zip(start, end, strict=True))
        return Box(start, extent) if all(e > 0 for e in extent) else None

    def inside(self, outer: Box) -> Box:
        """Return this box relative to the start of `outer`, which contains it."""
        return Box(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.extent)


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def part(shape: tuple[int, ...], dim: int, start: int, size: int) -> Box:
    """Return the box of `size` indices from `start` along one dimension, and all of the others."""
    return Box(
        tuple(start if d == dim else 0 for d in range(len(shape))),
        tuple(size if d == dim else n for d, n in enumerate(shape)),
    )


def tiles(pieces: list[Box], outer: Box) -> str | None:
    """Return why the pieces do not cover `outer` exactly once, or None where they do. Pieces may reach beyond `outer`."""
    clipped = [common for piece in pieces if (common := piece.common(outer))]
    if sum(piece.volume for piece in clipped) < outer.volume:
        return "its pieces do not cover it"
    ordered = sorted(clipped, key=lambda piece: piece.offset)
    # Boxes of one cut are a row of slabs, where neighbours decide; other shapes are compared pairwise.
    slabs = sum(1 for side in zip(*(piece.extent for piece in ordered), strict=True) if len(set(side)) > 1) <= 1
    near = 1 if slabs and _one_dimension(ordered) else len(ordered)
    for i, piece in enumerate(ordered):
        if any(piece.common(other) for other in ordered[i + 1 : i + 1 + near]):
            return "two pieces overlap"
    return None


def _one_dimension(pieces: list[Box]) -> bool:
    return sum(1 for side in zip(*(piece.offset for piece in pieces), strict=True) if len(set(side)) > 1) <= 1
