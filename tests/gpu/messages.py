"""One of two processes that pass pieces by the ``nccl`` transport; each has a GPU of its own.

usage: messages.py RANK PORT versions        sends or receives two versions through a window smaller than them
       messages.py RANK PORT stuck FILE      the second message never comes through, on a machine whose events FILE stops
"""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hpt.checksum import checksum_of
from megatron_hpt.errors import DeadlineError
from megatron_hpt.transfer.boxes import whole
from megatron_hpt.transfer.manifest import Contents, Piece
from megatron_hpt.transfer.transports import TRANSPORTS, Outgoing, collective
from megatron_hpt.transfer.transports.mapped import laid_out

TENSORS, WINDOW, DEADLINE_S = 7, 3000, 4


def meeting(port: int, seconds: float) -> dict:
    library = collective.library("nccl")
    return {"host": "127.0.0.1", "port": port, "size": 2, "seconds": seconds, "library": library, "senders": 1}


def listening(rank: int, port: int) -> socket.socket | None:
    return socket.create_server(("127.0.0.1", port)) if rank == 0 else None


def versions(rank: int, port: int) -> None:
    """Rank 0 sends; rank 1 compares every piece with what it computes itself."""
    collective.WIRES["nccl"] = replace(collective.WIRES["nccl"], window=WINDOW)
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randn(300 + i, 5).to(torch.bfloat16).cuda() for i in range(TENSORS)}
    boxes = [(name, whole(tuple(tensor.shape))) for name, tensor in tensors.items()]
    if rank == 0:
        sink = TRANSPORTS["nccl"].sink(Outgoing(0, boxes, [torch.bfloat16] * TENSORS))
        sink.meet(0, meeting(port, 60), 0, listening(rank, port))
        for version in range(2):
            sums = [sink.put(index, tensor.mul_(1.5)) for index, tensor in enumerate(tensors.values())]
            sink.commit(version)
            sink.transmit(0, [(index, index, 1) for index in range(TENSORS)])
            assert sums == [checksum_of(tensor) for tensor in tensors.values()]
        sink.close()
        return
    positions, _ = laid_out([2 * box.volume for _, box in boxes])
    pieces = [Piece(name, box, 0, at, 2 * box.volume, (0,)) for (name, box), at in zip(boxes, positions, strict=True)]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    contents = replace(Contents("s", "nccl", "bfloat16", shapes, ({},), tuple(pieces)), rendezvous=meeting(port, 60))
    incoming = TRANSPORTS["nccl"].incoming(contents, list(enumerate(pieces)), 0)
    assert not incoming.whole
    for version in range(2):
        arrived = 0
        for number, piece in incoming.receive(version):
            expected = tensors[piece.name].mul_(1.5)
            arrived += torch.equal(incoming.view(number, piece).view(torch.bfloat16).view(expected.shape), expected)
        assert arrived == TENSORS
    incoming.close()


def stuck(rank: int, port: int, stop: Path) -> None:
    """Both ends get the deadline's error, and both live on: torch's watchdog would end the process of the one that is well."""
    place = collective.Meeting("nccl", meeting(port, DEADLINE_S), rank, listening(rank, port))
    data = torch.zeros(1024, dtype=torch.uint8, device="cuda")

    def message(tag: int) -> None:
        place.finish(place.send(data, 1, tag) if rank == 0 else place.receive(data, 0, tag), f"message {tag}")

    message(0)
    time.sleep(1)  # until both have it
    stop.touch()
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="did not come through"):
        message(1)
    assert DEADLINE_S - 1 < time.monotonic() - started < 6 * DEADLINE_S
    time.sleep(3 * DEADLINE_S)
    print("alive", flush=True)


if __name__ == "__main__":
    rank, port, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.cuda.set_device(rank)
    versions(rank, port) if kind == "versions" else stuck(rank, port, Path(sys.argv[4]))
