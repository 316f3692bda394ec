"""The engine's side of the weight transfer: agree on contents, check a version, hand its tensors to the loader, compare.

Imports neither an engine nor Megatron, so any engine process (and any test) can host it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_hpt.checksum import checksum_of
from megatron_hpt.errors import TransferError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.layouts import EngineLayout, engine_holdings, held_by
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece, check_contents, dtype_of
from megatron_hpt.transfer.quantize import Fp8Format
from megatron_hpt.transfer.transports import TRANSPORTS, Incoming
from megatron_hpt.transfer.wire_format import Wire

Loaded = TypeVar("Loaded")
ReadBack = Callable[[str, Box], Iterable[Tensor]]
"""(HF name, box) → what the engine's model now holds there, once for each place where it keeps it (`EngineWeights.read`)."""


@dataclass(frozen=True)
class Seat:
    """Which part of the model this engine rank holds."""

    shape: ModelShape
    layout: EngineLayout
    rank: int
    dtype: str
    fp8: Fp8Format | None = None
    """The engine holds an FP8 checkpoint."""

    def boxes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, Box]]:
        """Return the shapes of the model's tensors, and this rank's box of each that it holds."""
        tensors = Wire(self.shape, self.dtype, self.fp8).tensors
        return tensors, dict(held_by(engine_holdings(tensors, self.shape, self.layout), self.rank))


class Receiver:
    """Takes in versions of one trainer's weights for one engine rank; the engine's plugin calls it.

    `agree` comes once for each trainer; for each version `take`, `load`, and `compare` where the manifest asks for it.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._expected, self._boxes = seat.boxes()
        self._contents: Contents | None = None
        self._incoming: Incoming | None = None
        self._manifest: Manifest | None = None
        self._mine: dict[str, list[tuple[int, Piece]]] = {}
        self._arriving: Iterator[tuple[int, Piece]] = iter(())
        self.seconds: dict[str, float] = {}
        """Seconds of the last version's steps: receive (until its last byte was read), load, compare."""

    def agree(self, contents: Contents) -> None:
        """Accept a trainer's contents in place of any others, and open the transport's receiving end.

        Raises:
            TransferError: they are not this model, do not cover this rank's boxes, or need a transport that is not here.
            DeadlineError: the trainer did not come to the meeting in time.
        """
        check_contents(contents, self._expected, self._seat.dtype, self._boxes, self._seat.rank)
        if contents.transport not in TRANSPORTS:
            raise TransferError(f"transport {contents.transport!r} is not known here; known: {', '.join(TRANSPORTS)}")
        self.close()
        mine = [
            (number, piece)
            for number, piece in enumerate(contents.pieces)
            if piece.name in self._boxes and piece.is_for(self._seat.rank) and piece.box.common(self._boxes[piece.name])
        ]
        self._incoming = TRANSPORTS[contents.transport].incoming(contents, mine, self._seat.rank)
        self._contents = contents
        self._mine = {name: [] for name in self._boxes}
        for number, piece in mine:
            self._mine[piece.name].append((number, piece))

    def take(self, manifest: Manifest) -> None:
        """Begin a version; where all of it is within reach at once, check every piece before anything is loaded.

        Raises:
            TransferError: nothing was agreed on, another trainer has taken over, or a piece arrived damaged.
            DeadlineError: a piece did not come in time.
        """
        contents, incoming = self._agreed()
        if manifest.session != contents.session:
            raise TransferError(
                f"trainer {manifest.session} has not prepared this engine, or trainer {contents.session} has taken it over"
            )
        if manifest.contents != contents.digest or len(manifest.checksums) != len(contents.pieces):
            raise TransferError(f"version {manifest.version} does not belong to the contents that were agreed on")
        self._manifest, self.seconds = manifest, {}
        checked = self._checked(incoming.receive(manifest.version))
        with self._timed("receive"):
            self._arriving = iter(list(checked)) if incoming.whole else checked

    def _checked(self, arriving: Iterator[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        for number, piece in arriving:
            found, wanted = checksum_of(self._agreed()[1].view(number, piece)), self._manifest.checksums[number]
            if found != wanted:
                raise TransferError(
                    f"version {self._manifest.version}: {piece.name} at {piece.box.offset} arrived damaged "
                    f"(xxh3 {found:016x}, the manifest says {wanted:016x})"
                )
            yield number, piece

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield HF tensors of the version that was taken, in the shape of the whole, as they become complete.

        Only this rank's box of a tensor holds weights: loaders cut it out. A tensor of one piece is read in place.

        Raises:
            TransferError: as `take`, for transports that bring pieces one by one.
        """
        begun: dict[str, list] = {}
        for number, piece in self._arriving:
            part = self._tensor(number, piece)
            if piece.box.extent == self._expected[piece.name]:
                yield piece.name, part
                continue
            if piece.name not in begun:  # memory that is not touched costs nothing on the host
                tensor = torch.empty(self._expected[piece.name], dtype=part.dtype, device=part.device)
                begun[piece.name] = [tensor, len(self._mine[piece.name])]
            begun[piece.name][0][piece.box.slices] = part
            begun[piece.name][1] -= 1
            if not begun[piece.name][1]:
                yield piece.name, begun.pop(piece.name)[0]

    def compare(self, read: ReadBack) -> None:
        """Compare what the engine now holds with what arrived: element by element where that is still within reach,
        else by checksum.

        Raises:
            TransferError: names the first tensor that differs.
        """
        with self._timed("compare"):
            for name, pieces in self._mine.items():
                for number, piece in pieces:
                    common = piece.box.common(self._boxes[name])
                    if not all(self._is_sent(number, piece, common, found) for found in read(name, common)):
                        raise TransferError(f"{name} at {common.offset}: the engine's weights are not those that were sent")

    def _is_sent(self, number: int, piece: Piece, box: Box, found: Tensor) -> bool:
        if not self._agreed()[1].whole:
            return box == piece.box and checksum_of(found) == self._manifest.checksums[number]
        sent = self._tensor(number, piece)[box.inside(piece.box).slices]
        return found.shape == sent.shape and torch.equal(found.to(sent.device), sent)

    def load(self, load: Callable[[Iterator[tuple[str, Tensor]]], Loaded]) -> Loaded:
        """Give the tensors of the version that was taken to an engine's loader, and return what the loader returns."""
        with self._timed("load"):
            return load(self.tensors())

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    @property
    def names(self) -> Mapping[str, Box]:
        """This rank's box of every tensor that it holds."""
        return self._boxes

    def close(self) -> None:
        """Close the receiving end, and forget what was agreed on."""
        if self._incoming is not None:
            self._incoming.close()
        self._incoming, self._contents, self._mine, self._arriving = None, None, {}, iter(())

    def _agreed(self) -> tuple[Contents, Incoming]:
        if self._contents is None or self._incoming is None:
            raise TransferError("nothing has been agreed on with this engine: prepare it first")
        return self._contents, self._incoming

    def _tensor(self, number: int, piece: Piece) -> Tensor:
        data = self._agreed()[1].view(number, piece)
        dtype = dtype_of(piece.name, self._expected, self._seat.dtype)
        return data.view(getattr(torch, dtype)).view(piece.box.extent)


def wait_for(device: torch.device) -> None:
    """Return when a device has done all that was queued on it: what was sent may be overwritten once an engine has answered,
    and its next forward pass must find the new weights. A host has no such queue.

    Args:
        device: where the engine's model is.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compare_only(seat: Seat, contents: Contents, manifest: Manifest, read: ReadBack) -> None:
    """Compare an engine with weights from elsewhere, without loading them or touching what a trainer agreed on.

    Raises:
        TransferError: names the first tensor that differs.
    """
    receiver = Receiver(seat)
    try:
        receiver.agree(contents)
        receiver.take(manifest)
        receiver.compare(read)
    finally:
        receiver.close()
