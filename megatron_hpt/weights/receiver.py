"""The engine's side of the weight transfer: agree on contents, check a version, hand its tensors to the loader, compare.

Imports neither an engine nor Megatron, so any engine process (and any test) can host it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.boxes import Box
from megatron_hpt.weights.checksum import checksum_of
from megatron_hpt.weights.hf_config import ModelShape
from megatron_hpt.weights.layouts import EngineLayout, engine_holdings, held_by
from megatron_hpt.weights.manifest import Contents, Manifest, Piece, check_contents
from megatron_hpt.weights.mapping import hf_tensor_shapes
from megatron_hpt.weights.transports import RECEIVERS, Incoming

ReadBack = Callable[[str, Box], Iterable[Tensor]]
"""(HF name, box) → what the engine's model now holds there, once for each place where it keeps it."""


@dataclass(frozen=True)
class Seat:
    """Which part of the model this engine rank holds."""

    shape: ModelShape
    layout: EngineLayout
    rank: int
    dtype: str

    def boxes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, Box]]:
        """Shapes of the model's tensors, and this rank's box of each that it holds."""
        tensors = hf_tensor_shapes(self.shape)
        return tensors, dict(held_by(engine_holdings(tensors, self.shape, self.layout), self.rank))


class Receiver:
    """Takes in versions of one trainer's weights for one engine rank."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._expected, self._boxes = seat.boxes()
        self._contents: Contents | None = None
        self._incoming: Incoming | None = None
        self._mine: dict[str, list[tuple[int, Piece]]] = {}

    def agree(self, contents: Contents) -> None:
        """Accept a trainer's contents, in place of any other's.

        Raises:
            TransferError: they are not this model, do not cover this rank's boxes, or need a transport that is not here.
        """
        check_contents(contents, self._expected, self._seat.dtype, list(self._boxes.items()))
        if contents.transport not in RECEIVERS:
            raise TransferError(f"transport {contents.transport!r} is not known here; known: {', '.join(RECEIVERS)}")
        self.close()
        mine = {
            name: [(n, p) for n, p in pieces if p.box.common(self._boxes[name])]
            for name, pieces in contents.by_tensor().items()
            if name in self._boxes
        }
        self._incoming = RECEIVERS[contents.transport](contents, [p for pieces in mine.values() for _, p in pieces])
        self._contents, self._mine = contents, mine

    def take(self, manifest: Manifest) -> None:
        """Bring the bytes of one version here and check every piece, before anything is loaded.

        Raises:
            TransferError: nothing was agreed on, another trainer has taken over, or a piece that is damaged or late.
        """
        contents, incoming = self._agreed()
        if manifest.session != contents.session:
            raise TransferError(
                f"trainer {manifest.session} has not prepared this engine, or trainer {contents.session} has taken it over"
            )
        if manifest.contents != contents.digest or len(manifest.checksums) != len(contents.pieces):
            raise TransferError(f"version {manifest.version} does not belong to the contents that were agreed on")
        incoming.receive(manifest.version)
        for pieces in self._mine.values():
            for number, piece in pieces:
                found = checksum_of(incoming.view(piece))
                if found != manifest.checksums[number]:
                    raise TransferError(
                        f"version {manifest.version}: {piece.name} at {piece.box.offset} arrived damaged "
                        f"(xxh3 {found:016x}, the manifest says {manifest.checksums[number]:016x})"
                    )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Whole-shaped HF tensors of the version that was taken, one at a time.

        Only this rank's box of a tensor holds weights: loaders cut it out. A tensor of one piece is read in place.
        """
        for name, pieces in self._mine.items():
            shape = self._expected[name]
            if len(pieces) == 1 and pieces[0][1].box.extent == shape:
                yield name, self._tensor(pieces[0][1])
                continue
            tensor = torch.empty(shape, dtype=self._dtype)  # memory that is not touched costs nothing on the host
            for _, piece in pieces:
                tensor[piece.box.slices] = self._tensor(piece)
            yield name, tensor

    def compare(self, read: ReadBack) -> None:
        """Compare what the engine now holds with what arrived, element by element.

        Raises:
            TransferError: naming the first tensor that differs.
        """
        for name, pieces in self._mine.items():
            own = self._boxes[name]
            for _, piece in pieces:
                common = piece.box.common(own)
                sent = self._tensor(piece)[common.inside(piece.box).slices]
                for found in read(name, common):
                    if found.shape != sent.shape or not torch.equal(found.to(sent.device), sent):
                        raise TransferError(f"{name} at {common.offset}: the engine's weights are not those that were sent")

    @property
    def names(self) -> Mapping[str, Box]:
        """This rank's box of every tensor that it holds."""
        return self._boxes

    def close(self) -> None:
        """Let go of the sender's memory."""
        if self._incoming is not None:
            self._incoming.close()
        self._incoming, self._contents, self._mine = None, None, {}

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._seat.dtype)

    def _agreed(self) -> tuple[Contents, Incoming]:
        if self._contents is None or self._incoming is None:
            raise TransferError("nothing has been agreed on with this engine: prepare it first")
        return self._contents, self._incoming

    def _tensor(self, piece: Piece) -> Tensor:
        return self._agreed()[1].view(piece).view(self._dtype).view(piece.box.extent)
