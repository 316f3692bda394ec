"""The weight transfer between two processes on one device: a real sending end, a real receiving end, every piece checked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from megatron_hpt.checksum import checksum_of
from megatron_hpt.transfer.boxes import whole
from megatron_hpt.transfer.manifest import Contents, Piece
from megatron_hpt.transfer.transports import TRANSPORTS, Outgoing

from .measurement import Measurement
from .sizes import Sizes

TENSORS = 16
VERSIONS = 4


def weights(sizes: Sizes) -> Iterator[Measurement]:
    """Send versions of some tensors through ``cuda_ipc`` as a colocated engine receives them; rehearsals use shared memory."""
    transport = "cuda_ipc" if sizes.device.type == "cuda" else "shared_memory"
    count = sizes.copy_elements // TENSORS
    tensors = {f"tensor.{i}": torch.randn(count, device=sizes.device).to(torch.bfloat16) for i in range(TENSORS)}
    boxes = [(name, whole(tuple(tensor.shape))) for name, tensor in tensors.items()]
    sink = TRANSPORTS[transport].sink(Outgoing(0, boxes, [torch.bfloat16] * TENSORS))
    pieces = [Piece(name, box, 0, at, 2 * box.volume) for (name, box), at in zip(boxes, sink.positions, strict=True)]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    contents = Contents("gpu_check", transport, "bfloat16", shapes, (sink.source,), tuple(pieces))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receive, args=(theirs, contents.to_json()))
    receiver.start()
    try:
        stage, read, right = _versions(sink, tensors, ours)
    finally:
        ours.send(None)
        receiver.join()
        sink.close()
    nbytes = contents.nbytes
    yield Measurement("weights", f"{transport}: pieces that arrived as they were sent", right, "share", 1, 1)
    yield Measurement("weights", f"{transport}: staged and hashed", nbytes / stage / 1e9, "GB/s", note="hashed on the host")
    yield Measurement("weights", f"{transport}: copied out by the other process", nbytes / read / 1e9, "GB/s")


def _versions(sink: Any, tensors: dict[str, torch.Tensor], connection: Connection) -> tuple[float, float, float]:
    stages, reads, right = [], [], 0
    for version in range(VERSIONS):
        for tensor in tensors.values():
            tensor.mul_(1.01)
        started = time.perf_counter()
        sent = [sink.put(index, tensor) for index, tensor in enumerate(tensors.values())]
        sink.commit(version)
        stages.append(time.perf_counter() - started)
        connection.send(version)
        seconds, found = connection.recv()
        reads.append(seconds)
        right += sum(a == b for a, b in zip(sent, found, strict=True))
    return min(stages), min(reads), right / (VERSIONS * len(tensors))


def _receive(connection: Connection, described: dict[str, Any]) -> None:
    contents = Contents.from_json(described)
    numbered = list(enumerate(contents.pieces))
    incoming = TRANSPORTS[contents.transport].incoming(contents, numbered, 0)
    own: dict[int, torch.Tensor] = {}
    while (version := connection.recv()) is not None:
        started = time.perf_counter()
        for number, piece in incoming.receive(version):
            data = incoming.view(number, piece)
            own.setdefault(number, torch.empty_like(data)).copy_(data)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        connection.send((seconds, [checksum_of(own[number]) for number, _ in numbered]))
    incoming.close()
