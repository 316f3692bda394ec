"""How the bytes travel: one row a transport. The contents and manifests above them are the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hpt.errors import ConfigError
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.manifest import Contents, Piece


class Sink(Protocol):
    """A transport's sending end on one rank, for boxes of known sizes."""

    source: dict[str, Any]
    """How receivers find it; plain data."""
    positions: list[int]
    """First byte of each box there."""

    def put(self, index: int, value: Tensor) -> int:
        """Take in the box of that index, of any strides; return the checksum of its bytes in row-major order."""

    def commit(self, version: int) -> None:
        """All boxes of a version are in; let receivers have them."""

    def close(self) -> None:
        """Let go of everything."""


class Messages(Sink, Protocol):
    """A sending end that talks to each engine."""

    def meet(self, engine: int, rendezvous: dict[str, Any], rank: int, listener: socket | None) -> None:
        """Join the group of one engine; returns when all are there. Whoever has the listener hosts the meeting."""

    def transmit(self, engine: int, messages: Sequence[tuple[int, int, int]]) -> None:
        """Send to one engine: (index of the box here, number of the piece, rank in the group), in the global order."""

    def part(self, engine: int) -> None:
        """Leave the group of one engine."""


class Incoming(Protocol):
    """A transport's receiving end on one engine rank."""

    whole: bool
    """All pieces of a version are within reach at once; else each only until the next one."""

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """(number, piece) as they come within reach, in the global order; raises TransferError or DeadlineError."""

    def view(self, number: int, piece: Piece) -> Tensor:
        """[nbytes] uint8 of a piece within reach."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass(frozen=True)
class Outgoing:
    """What a sending end is made for."""

    rank: int
    boxes: Sequence[tuple[str, Box]]
    dtypes: Sequence[torch.dtype]
    """Of each box."""
    folder: str = ""
    """Of files: where versions lie, on a file system that trainer and engines share."""
    full_every: int = 1
    """Of files: every k-th version is whole, those between hold what changed."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each box."""
        return [box.volume * dtype.itemsize for (_, box), dtype in zip(self.boxes, self.dtypes, strict=True)]


@dataclass(frozen=True)
class Transport:
    """One way for the bytes."""

    sink: Callable[[Outgoing], Any]
    incoming: Callable[[Contents, Sequence[tuple[int, Piece]], int], Incoming]
    """(contents, own pieces with their numbers, rank in the engine) → receiving end."""
    multicast: bool
    """One copy of a box serves every receiver."""
    meets: bool = False
    """The sending end talks to each engine (`Messages`)."""


def _segment(outgoing: Outgoing) -> Sink:
    from megatron_hpt.transfer.transports.mapped import SegmentSink

    return SegmentSink(outgoing.sizes)


def _mapped(contents: Contents, pieces: Sequence[tuple[int, Piece]], _: int) -> Incoming:
    from megatron_hpt.transfer.transports.mapped import Mapped

    return Mapped(contents.sources, pieces)


def _files(outgoing: Outgoing) -> Sink:
    from megatron_hpt.transfer.transports.files import FileSink

    return FileSink(Path(outgoing.folder), outgoing.rank, outgoing.boxes, outgoing.dtypes, outgoing.full_every)


def _from_files(contents: Contents, pieces: Sequence[tuple[int, Piece]], _: int) -> Incoming:
    from megatron_hpt.transfer.transports.files import FileIncoming

    return FileIncoming(contents.sources, pieces)


def _messages(name: str) -> Callable[[Outgoing], Messages]:
    def sink(outgoing: Outgoing) -> Messages:
        from megatron_hpt.transfer.transports.collective import CollectiveSink

        return CollectiveSink(name, outgoing.sizes)

    return sink


def _from_messages(contents: Contents, pieces: Sequence[tuple[int, Piece]], rank: int) -> Incoming:
    from megatron_hpt.transfer.transports.collective import CollectiveIncoming

    return CollectiveIncoming(contents.transport, contents.rendezvous, pieces, rank)


def _device(outgoing: Outgoing) -> Sink:
    from megatron_hpt.transfer.transports.cuda_ipc import DeviceSink

    return DeviceSink(outgoing.sizes)


def _from_device(contents: Contents, pieces: Sequence[tuple[int, Piece]], _: int) -> Incoming:
    from megatron_hpt.transfer.transports.cuda_ipc import DeviceIncoming

    return DeviceIncoming(contents.sources, pieces)


TRANSPORTS: dict[str, Transport] = {
    "shared_memory": Transport(_segment, _mapped, multicast=True),
    "files": Transport(_files, _from_files, multicast=True),
    "gloo": Transport(_messages("gloo"), _from_messages, multicast=False, meets=True),
    "cuda_ipc": Transport(_device, _from_device, multicast=True),
    "nccl": Transport(_messages("nccl"), _from_messages, multicast=False, meets=True),
}
"""`transfer.transport` → the transport."""
NEED_CUDA = ("cuda_ipc", "nccl")


def check_transport(name: str) -> None:
    """Refuse what cannot run on this machine.

    Raises:
        ConfigError: it needs a GPU; says what does not.
    """
    if name in NEED_CUDA and not torch.cuda.is_available():
        raise ConfigError(
            f"transfer.transport={name}: needs CUDA, and this machine has none; allowed here: "
            f"{', '.join(t for t in TRANSPORTS if t not in NEED_CUDA)}"
        )
