"""What travels with weights: the contents, agreed on once, and a manifest for every version. Pure; imports no torch.

The contents say which box of which tensor lies where; they hold as long as sender and engine live. A manifest names a
version and has a checksum for every piece. An engine loads nothing before both have been checked.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.boxes import Box, tiles

SCALES = (".weight_scale_inv", ".weight_scale")
"""Endings of the names of scales in FP8 checkpoints, block-wise and per tensor."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of one HF tensor, in one place."""

    name: str
    box: Box
    source: int
    """Index into `Contents.sources`."""
    position: int
    """First byte there."""
    nbytes: int
    receivers: tuple[int, ...] = ()
    """Ranks of the engine that it is sent to; empty where any rank may read it."""

    def is_for(self, rank: int) -> bool:
        """Whether it is sent to this rank of the engine."""
        return not self.receivers or rank in self.receivers


def session_name() -> str:
    """Make a name for one trainer from start to end, by which a person can place it."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def _piece(names: Sequence[str], row: Sequence[Any]) -> Piece:
    number, offset, extent, source, position, nbytes, receivers = row
    box = Box(tuple(map(int, offset)), tuple(map(int, extent)))
    return Piece(names[number], box, int(source), int(position), int(nbytes), tuple(map(int, receivers)))


@dataclass(frozen=True)
class Contents:
    """Everything a receiver has to know before the first version."""

    session: str
    """Who sends: one trainer, from its start to its end."""
    transport: str
    """A row of `transports.TRANSPORTS`."""
    dtype: str
    """torch dtype name of the tensors that are not quantised, e.g. ``float32``."""
    shapes: dict[str, tuple[int, ...]]
    """HF name → shape of the whole tensor: the complete model."""
    sources: tuple[dict[str, Any], ...]
    """How the transport finds each sender's bytes."""
    pieces: tuple[Piece, ...]
    """In the global order, in which messages travel."""
    rendezvous: dict[str, Any] = field(default_factory=dict)
    """Where one engine and the trainer meet, for transports with `Transport.meets`."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for an HTTP body; a piece is a row [tensor, offset, extent, source, position, bytes, receivers]."""
        numbers = {name: i for i, name in enumerate(self.shapes)}
        return {
            "session": self.session,
            "transport": self.transport,
            "dtype": self.dtype,
            "tensors": [[name, list(shape)] for name, shape in self.shapes.items()],
            "sources": list(self.sources),
            "rendezvous": self.rendezvous,
            "pieces": [
                [numbers[p.name], list(p.box.offset), list(p.box.extent), p.source, p.position, p.nbytes, list(p.receivers)]
                for p in self.pieces
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contents:
        """Read what `to_json` wrote.

        Raises:
            TransferError: a field is missing or of the wrong kind.
        """
        try:
            names = [name for name, _ in data["tensors"]]
            return cls(
                session=str(data["session"]),
                transport=str(data["transport"]),
                dtype=str(data["dtype"]),
                shapes={name: tuple(map(int, shape)) for name, shape in data["tensors"]},
                sources=tuple(dict(source) for source in data["sources"]),
                rendezvous=dict(data["rendezvous"]),
                pieces=tuple(_piece(names, row) for row in data["pieces"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise TransferError(f"the contents of a transfer are malformed: {type(error).__name__}: {error}") from None

    @cached_property
    def digest(self) -> str:
        """The name of these contents in a manifest."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """One version of the weights of agreed contents."""

    session: str
    contents: str
    """`Contents.digest`."""
    version: int
    checksums: tuple[int, ...]
    """XXH3 of each piece, in the order of the pieces."""
    compare: bool
    """Whether the engine compares its own weights with what was sent after loading them."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for an HTTP body. Checksums are hexadecimal: JSON's numbers do not hold 64 bits everywhere."""
        return {
            "session": self.session,
            "contents": self.contents,
            "version": self.version,
            "checksums": [f"{c:016x}" for c in self.checksums],
            "compare": self.compare,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            TransferError: a field is missing or of the wrong kind.
        """
        try:
            checksums = tuple(int(c, 16) for c in data["checksums"])
            return cls(str(data["session"]), str(data["contents"]), int(data["version"]), checksums, bool(data["compare"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TransferError(f"the weight manifest is malformed: {type(error).__name__}: {error}") from None


def dtype_of(name: str, names: Container[str], plain: str) -> str:
    """Return the torch dtype name of a tensor on its way; those of an FP8 checkpoint follow from the names.

    Args:
        names: all tensors; a weight that has scales is FP8.
        plain: dtype of tensors that are not quantised.
    """
    if name.endswith(SCALES):
        return "float32"
    return "float8_e4m3fn" if any(name + suffix.removeprefix(".weight") in names for suffix in SCALES) else plain


def as_version(label: str | None) -> int | None:
    """Return an engine's version label as a number, or None for the labels that engines start with, such as ``default``."""
    return int(label) if label is not None and label.isdecimal() else None


def check_contents(
    contents: Contents, expected: Mapping[str, tuple[int, ...]], dtype: str, needed: Mapping[str, Box], rank: int
) -> None:
    """Refuse contents that are not this model, or do not cover exactly once what this engine rank needs.

    Args:
        expected: HF name → shape of every tensor of the engine's model.
        dtype: dtype that the engine loads.
        needed: the box of each tensor that this engine rank holds.
        rank: this rank in its engine.

    Raises:
        TransferError: names the first tensor that is missing, unknown, of another shape, or not covered exactly once.
    """
    missing, unknown = expected.keys() - contents.shapes.keys(), contents.shapes.keys() - expected.keys()
    if missing or unknown:
        raise TransferError(f"{len(missing)} tensors missing ({_some(missing)}), {len(unknown)} unknown ({_some(unknown)})")
    if contents.dtype != dtype:
        raise TransferError(f"the weights are {contents.dtype}, the engine wants {dtype}; set model.dtype alike on both sides")
    for name, shape in expected.items():
        if contents.shapes[name] != tuple(shape):
            raise TransferError(f"{name} has shape {contents.shapes[name]}, expected {tuple(shape)}")
    boxes: dict[str, list[Box]] = defaultdict(list)
    for piece in contents.pieces:
        shape = contents.shapes.get(piece.name, ())
        sides = list(zip(piece.box.offset, piece.box.extent, shape, strict=False))
        if len(piece.box.offset) != len(shape) or not all(o >= 0 and e > 0 and o + e <= n for o, e, n in sides):
            raise TransferError(f"{piece.name}: a piece at {piece.box.offset} + {piece.box.extent} does not fit {shape}")
        if piece.is_for(rank):
            boxes[piece.name].append(piece.box)
    for name, box in needed.items():
        if reason := tiles(boxes[name], box):
            raise TransferError(f"{name} at {box.offset} + {box.extent}: {reason}")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "") if names else "none"
