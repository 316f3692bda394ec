"""How the bytes travel: a transport is a row of `TRANSPORTS`. Contents and manifests are the same for all.

A transport provides two ends:

* `Sink` (or `Messages`), on each trainer rank. `sending.staging.Staging` opens it once, and for each version calls `put` for
  every box, then `commit`. For `Messages`, `sending.driver.EngineDriver` calls `meet` while the engine prepares, and
  `transmit` while it updates: each engine in a thread of its own, before or after its ranks begin to receive.
* `Incoming`, on each engine rank. `receiver.Receiver` opens it when contents are agreed on (`agree`); for each version it
  iterates over `receive`, and reads each piece by `view`, from which it checks and loads.

Either end raises TransferError for what is lost, damaged or refused, and DeadlineError for who is late. `source` and
`rendezvous` are plain data that go from one side to the other in the contents.
"""

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
    """A transport's sending end on one trainer rank, for the boxes of an `Outgoing`."""

    source: dict[str, Any]
    """How receivers find this end; plain data that JSON can hold."""
    positions: list[int]
    """First byte of each box at this end."""

    def put(self, index: int, value: Tensor) -> int:
        """Take in the box of that index, of any strides, and return the checksum of its bytes in row-major order."""

    def commit(self, version: int) -> None:
        """Let receivers have the version, whose boxes have all been put."""

    def close(self) -> None:
        """Free what this end holds."""


class Messages(Sink, Protocol):
    """A sending end that sends messages to each engine, after it has met it."""

    def meet(self, engine: int, rendezvous: dict[str, Any], rank: int, listener: socket | None) -> None:
        """Join the group of one engine, in place of an earlier one, and return when all are there.

        Args:
            listener: the open socket at the rendezvous, for rank 0, which hosts the meeting.
        """

    def transmit(self, engine: int, messages: Sequence[tuple[int, int, int]]) -> None:
        """Send a version to one engine, and return when all of it has been taken.

        Args:
            messages: (index of the box here, number of the piece, rank in the group), in the global order.
        """


class Incoming(Protocol):
    """A transport's receiving end on one engine rank."""

    whole: bool
    """Whether all pieces of a version are within reach at once; else each is only until the next one comes."""

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """Yield (number, piece) as the pieces of a version come within reach, in the global order."""

    def view(self, number: int, piece: Piece) -> Tensor:
        """Return the bytes of a piece within reach, [nbytes] uint8; in place where that is possible."""

    def close(self) -> None:
        """Free what this end holds."""


@dataclass(frozen=True)
class Outgoing:
    """What a sending end is opened for."""

    rank: int
    boxes: Sequence[tuple[str, Box]]
    dtypes: Sequence[torch.dtype]
    """Of each box as it travels."""
    folder: str = ""
    """Where the transport ``files`` writes versions, on a file system that trainer and engines share."""
    full_every: int = 1
    """The transport ``files`` writes every k-th version whole, and between them only what changed."""

    @property
    def sizes(self) -> list[int]:
        """Bytes of each box."""
        return [box.volume * dtype.itemsize for (_, box), dtype in zip(self.boxes, self.dtypes, strict=True)]


@dataclass(frozen=True)
class Transport:
    """One way for the bytes: makes either end. Each function imports its module when it is called, on its side only."""

    sink: Callable[[Outgoing], Any]
    incoming: Callable[[Contents, Sequence[tuple[int, Piece]], int], Incoming]
    """(contents, this rank's pieces with their numbers, rank in the engine) → receiving end."""
    multicast: bool
    """One copy of a box serves every receiver."""
    meets: bool = False
    """The sending end sends messages to each engine (`Messages`), which its ranks and the trainer's first meet for."""


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
    """Refuse a transport that cannot run on this machine; preflight calls it.

    Raises:
        ConfigError: it needs a GPU; names those that do not.
    """
    if name in NEED_CUDA and not torch.cuda.is_available():
        raise ConfigError(
            f"transfer.transport={name}: needs CUDA, and this machine has none; allowed here: "
            f"{', '.join(t for t in TRANSPORTS if t not in NEED_CUDA)}"
        )
