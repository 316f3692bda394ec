"""Point-to-point messages between actor ranks and engine ranks: ``gloo`` between hosts, ``nccl`` between GPUs.

One process group for each engine: actor ranks first, then the engine's. They meet at a store that the trainer's first rank
hosts; the engine is told of it by its own HTTP API. Every party walks through the pieces in one global order with a
window of bytes under way. The earliest piece that is not complete has both its ends posted, so nobody waits in a circle.

The groups are bare: they are not those of `torch.distributed`, of which an engine has its own. Gloo's and NCCL's wire
formats want the same library on both sides; for NCCL that is checked when they meet.
"""

from __future__ import annotations

import datetime
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from socket import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hpt.errors import DeadlineError, TransferError
from megatron_hpt.transfer.manifest import Piece


@dataclass(frozen=True)
class GroupKind:
    """One kind of process group."""

    device: str
    window: int | None
    """Most bytes under way and held by one rank; None: all, so a version is checked before any of it is loaded."""

    def group(self, name: str, store: dist.Store, rank: int, size: int, seconds: float) -> Any:
        """Make a bare process group."""
        timeout = datetime.timedelta(seconds=seconds)
        if name == "gloo":
            return dist.ProcessGroupGloo(store, rank, size, timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        with _variable("TORCH_NCCL_BLOCKING_WAIT", "1"):
            return dist.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable that torch reads where a group is made.

    By default a wait for NCCL returns at once, and torch's watchdog ends the process at the deadline: also that of the peer
    which is well. A blocking wait raises, on both ends, and both live.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


WIRES = {"gloo": GroupKind("cpu", None), "nccl": GroupKind("cuda", 1 << 30)}


def library(name: str) -> str:
    """Return the version of the library that both sides must have alike; empty where nothing is checked."""
    return ".".join(map(str, torch.cuda.nccl.version())) if name == "nccl" else ""


class Meeting:
    """This rank's place in the group of one engine and the trainer."""

    def __init__(self, name: str, rendezvous: dict[str, Any], rank: int, listener: socket | None = None) -> None:
        """Join the group, and return when all are there.

        Args:
            rendezvous: host, port, number of members, seconds, library.
            listener: the open socket at that address, for the rank that hosts the meeting.

        Raises:
            DeadlineError: not all ranks came in time.
            TransferError: the other side has another version of the library.
        """
        own = library(name)
        if rendezvous["library"] != own:
            raise TransferError(
                f"transport {name}: the trainer has version {rendezvous['library']}, this engine {own}; install one version "
                "in both environments"
            )
        self._seconds = float(rendezvous["seconds"])
        where = f"{rendezvous['host']}:{rendezvous['port']}"
        try:
            self._store = dist.TCPStore(
                rendezvous["host"],
                int(rendezvous["port"]),
                int(rendezvous["size"]),
                is_master=listener is not None,
                timeout=datetime.timedelta(seconds=self._seconds),
                master_listen_fd=None if listener is None else listener.detach(),  # the store closes it
            )
            group = WIRES[name].group(name, dist.PrefixStore("weights", self._store), rank, rendezvous["size"], self._seconds)
        except (dist.DistError, RuntimeError) as error:
            raise DeadlineError(
                f"transport {name}: not all {rendezvous['size']} ranks met at {where} within {self._seconds:g} s: {error}"
            ) from None
        self._group = group

    def send(self, data: Tensor, to: int, tag: int) -> Any:
        """Start to send, and return the work that `finish` waits for.

        Raises:
            TransferError: the other end is gone.
        """
        with _named(f"piece {tag} could not be sent"):
            return self._group.send([data], to, tag)

    def receive(self, data: Tensor, of: int, tag: int) -> Any:
        """Start to receive, and return the work that `finish` waits for.

        Raises:
            TransferError: the other end is gone.
        """
        with _named(f"piece {tag} could not be received"):
            return self._group.recv([data], of, tag)

    def finish(self, work: Any, what: str) -> None:
        """Wait for a message that was started.

        Raises:
            DeadlineError: it did not come through in time, or the other end is gone.
        """
        try:
            work.wait(datetime.timedelta(seconds=self._seconds))
        except RuntimeError as error:
            raise DeadlineError(
                f"{what} did not come through within {self._seconds:g} s: {str(error).splitlines()[0]}"
            ) from None

    def close(self) -> None:
        """Leave the group."""
        self._group = self._store = None


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say what failed: torch's groups raise plain RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise TransferError(f"{what}: {str(error).splitlines()[0]}") from None


def windowed(items: Iterable[tuple[int, Any]], limit: int | None) -> Iterator[Any]:
    """Start messages by iterating, and yield each to be waited for, so that at most `limit` bytes are under way.

    Args:
        items: (bytes, message) in the global order; taking one starts it.
    """
    open_, under_way = deque(), 0
    for nbytes, message in items:
        open_.append((nbytes, message))
        under_way += nbytes
        while limit is not None and under_way > limit:
            done, oldest = open_.popleft()
            yield oldest
            under_way -= done
    yield from (message for _, message in open_)


class CollectiveSink:
    """Sending end on one rank: it stages boxes, then sends them to each engine's ranks."""

    def __init__(self, name: str, sizes: Sequence[int]) -> None:
        from megatron_hpt.transfer.transports.mapped import laid_out

        self._name, self._wire = name, WIRES[name]
        self.positions, nbytes = laid_out(sizes)
        self._sizes = list(sizes)
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=self._wire.device)
        self.source: dict[str, Any] = {}
        self._meetings: dict[int, Meeting] = {}

    def put(self, index: int, value: Tensor) -> int:
        """Stage a box, and return its checksum."""
        from megatron_hpt.checksum import copy_and_hash

        return copy_and_hash(self._box(index).view(value.dtype).view(value.shape), value)

    def commit(self, version: int) -> None:
        """Do nothing: messages go when an engine is served."""

    def meet(self, engine: int, rendezvous: dict[str, Any], rank: int, listener: socket | None) -> None:
        self.part(engine)
        self._meetings[engine] = Meeting(self._name, rendezvous, rank, listener)

    def transmit(self, engine: int, messages: Sequence[tuple[int, int, int]]) -> None:
        meeting = self._meetings[engine]
        started = ((self._sizes[index], (meeting.send(self._box(index), to, piece), piece)) for index, piece, to in messages)
        for work, piece in windowed(started, self._wire.window):
            meeting.finish(work, f"piece {piece} to engine {engine}")

    def part(self, engine: int) -> None:
        """Leave an engine's group."""
        if meeting := self._meetings.pop(engine, None):
            meeting.close()

    def close(self) -> None:
        """Leave all groups."""
        for engine in list(self._meetings):
            self.part(engine)
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _box(self, index: int) -> Tensor:
        return self._bytes[self.positions[index] :][: self._sizes[index]]


class CollectiveIncoming:
    """Receiving end on one engine rank."""

    whole: bool

    def __init__(self, name: str, rendezvous: dict[str, Any], pieces: Sequence[tuple[int, Piece]], rank: int) -> None:
        self._wire, self._pieces = WIRES[name], list(pieces)
        self.whole = self._wire.window is None
        self._meeting = Meeting(name, rendezvous, rendezvous["senders"] + rank)
        self._held: dict[int, Tensor] = {}

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """Yield pieces as they come in, in the global order; where there is a window, each can be viewed until the next one."""
        self._held.clear()
        for number, piece, work in windowed(self._started(), self._wire.window):
            self._meeting.finish(work, f"version {version}: {piece.name} at {piece.box.offset} from actor rank {piece.source}")
            yield number, piece
            if self._wire.window is not None:
                del self._held[number]

    def _started(self) -> Iterator[tuple[int, Any]]:
        for number, piece in self._pieces:
            data = torch.empty(piece.nbytes, dtype=torch.uint8, device=self._wire.device)
            self._held[number] = data
            yield piece.nbytes, (number, piece, self._meeting.receive(data, piece.source, number))

    def view(self, number: int, piece: Piece) -> Tensor:
        return self._held[number]

    def close(self) -> None:
        """Leave the group."""
        self._held.clear()
        self._meeting.close()
