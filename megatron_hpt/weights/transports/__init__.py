"""How the bytes travel: one row a transport. The contents and manifests above them are the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_hpt.weights.manifest import Contents, Piece


class Incoming(Protocol):
    """A transport's receiving end."""

    def receive(self, version: int) -> None:
        """Bring a version's bytes within reach; raises TransferError or DeadlineError."""

    def view(self, piece: Piece) -> Tensor:
        """[nbytes] uint8 of one piece of the version received last."""

    def close(self) -> None:
        """Let go of everything."""


class Sink(Protocol):
    """A transport's sending end on one rank, for boxes of known sizes."""

    source: dict[str, Any]
    """How receivers find it."""
    positions: list[int]
    """First byte of each box there."""

    def put(self, index: int, value: Tensor) -> int:
        """Take in the box of that index, of any strides; return the checksum of its bytes in row-major order."""

    def commit(self, version: int) -> None:
        """All boxes of a version are in; let receivers have them."""

    def close(self) -> None:
        """Let go of everything."""


def _mapped(contents: Contents, pieces: Sequence[Piece]) -> Incoming:
    from megatron_hpt.weights.transports.mapped import Mapped

    return Mapped(contents.sources)


def _segment(sizes: Sequence[int]) -> Sink:
    from megatron_hpt.weights.transports.mapped import SegmentSink

    return SegmentSink(sizes)


SENDERS: dict[str, Callable[[Sequence[int]], Sink]] = {"shared_memory": _segment}
"""Transport → its sending end for boxes of these many bytes."""
RECEIVERS: dict[str, Callable[[Contents, Sequence[Piece]], Incoming]] = {"shared_memory": _mapped}
"""Transport → its receiving end for the pieces that one engine rank takes."""
