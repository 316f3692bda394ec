"""How fast weights move on this machine, from a sender's tensors to the last byte that a receiver has read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_hpt.checksum import checksum_of
from megatron_hpt.transfer.boxes import whole
from megatron_hpt.transfer.manifest import Contents, Piece
from megatron_hpt.transfer.transports import TRANSPORTS, Outgoing


@dataclass(frozen=True)
class Speed:
    """One measurement of a transport beside copying memory; in seconds."""

    transport: str
    nbytes: int
    stage_s: float
    """Until the sender has brought its boxes where receivers find them."""
    receive_s: float
    """Until the receiver has read and checked every byte."""
    memcpy_s: float
    """Copying as many bytes once, on one thread."""

    @property
    def of_memcpy(self) -> float:
        """The rate of the whole way over the rate of one copy."""
        return self.memcpy_s / (self.stage_s + self.receive_s)


def memcpy_seconds(nbytes: int, repeats: int = 5) -> float:
    """Return the seconds of the fastest of some copies of `nbytes` bytes on this thread."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    return min(_seconds(lambda: target.copy_(source)) for _ in range(repeats))


def local_speed(transport: str, sizes: list[int], folder: Path, repeats: int = 5) -> Speed:
    """Move tensors of these many float32 elements from a sink to a receiving end in this process; keep the fastest round.

    It is a real transfer without engines: only their own loading is left out.
    """
    tensors = {f"tensor.{i}": torch.randn(size) for i, size in enumerate(sizes)}
    boxes = [(name, whole(tuple(tensor.shape))) for name, tensor in tensors.items()]
    sink = TRANSPORTS[transport].sink(Outgoing(0, boxes, [torch.float32] * len(boxes), str(folder)))
    pieces = tuple(Piece(name, box, 0, at, box.volume * 4) for (name, box), at in zip(boxes, sink.positions, strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    contents = Contents("measure", transport, "float32", shapes, (sink.source,), pieces)
    incoming = TRANSPORTS[transport].incoming(contents, list(enumerate(pieces)), 0)
    stage, receive = [], []
    for version in range(repeats):
        stage.append(_seconds(lambda v=version: _stage(sink, tensors, v)))
        receive.append(_seconds(lambda v=version: [checksum_of(incoming.view(n, p)) for n, p in incoming.receive(v)]))
    incoming.close()
    sink.close()
    nbytes = sum(piece.nbytes for piece in pieces)
    return Speed(transport, nbytes, min(stage), min(receive), memcpy_seconds(nbytes))


def _stage(sink, tensors: dict[str, torch.Tensor], version: int) -> None:
    for index, tensor in enumerate(tensors.values()):
        sink.put(index, tensor)
    sink.commit(version)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
