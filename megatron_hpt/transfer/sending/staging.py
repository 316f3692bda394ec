"""What is staged: this rank's boxes of a version, converted on the way to where the transport wants them, and checksums."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_hpt.errors import TransferError
from megatron_hpt.models.mapping import ShardView
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.manifest import Contents, Manifest
from megatron_hpt.transfer.quantize import PER_TENSOR, is_quantized
from megatron_hpt.transfer.sending.group import TrainerGroup
from megatron_hpt.transfer.transports import TRANSPORTS, Outgoing
from megatron_hpt.transfer.wire_format import Wire


@dataclass(frozen=True)
class StagedVersion:
    """A version that all ranks have staged."""

    version: int
    checksums: list[dict[tuple[str, Box], int]]
    """Of each rank's boxes."""

    def manifest(self, contents: Contents, *, compare: bool) -> Manifest:
        """Return the manifest of this version for whoever agreed on these contents."""
        checksums = tuple(self.checksums[piece.source][piece.name, piece.box] for piece in contents.pieces)
        return Manifest(contents.session, contents.digest, self.version, checksums, compare)


class Staging:
    """This rank's part of every version."""

    def __init__(self, group: TrainerGroup, wire: Wire, views: Sequence[ShardView], transport: str, outgoing: Outgoing) -> None:
        """Open the sending end of the transport; collective.

        Raises:
            HptError: on every rank, what any of them met.
        """
        self._group, self._wire, self._boxes = group, wire, outgoing.boxes
        self._views: dict[str, list[ShardView]] = {}
        for view in views:
            self._views.setdefault(view.name, []).append(view)
        self._amax: dict[str, torch.Tensor] = {}
        self.sink = group.collectively(lambda: TRANSPORTS[transport].sink(outgoing))

    def stage(self, version: int) -> StagedVersion:
        """Bring every rank's boxes, as the parameters now are, to where the transport wants them; collective.

        Raises:
            HptError: on every rank, what any of them met.
        """
        self._amax = self._largest()
        checksums = self._group.collectively(lambda: self._put(version))
        return StagedVersion(version, self._group.gather(checksums))

    @torch.no_grad()
    def _put(self, version: int) -> dict[tuple[str, Box], int]:
        checksums = {box: self.sink.put(index, self._source(*box)) for index, box in enumerate(self._boxes)}
        self.sink.commit(version)
        return checksums

    def _source(self, name: str, box: Box) -> torch.Tensor:
        """The box of a tensor as it travels, out of the local parameters; a copy only where layouts or formats differ."""
        plain = self._wire.plain_name(name)
        for view in self._views.get(plain, ()):
            held = dict(self._wire.boxes_of(view)).get(name)
            if held == box:
                return self._wire.converted(view, self._amax.get(plain))[name]
            if held is not None and held.common(box) == box:
                return self._part(view, name, box.inside(held))
        raise TransferError(f"{name} at {box.offset} is not held by rank {self._group.rank}, which was to send it")

    def _part(self, view: ShardView, name: str, inner: Box) -> torch.Tensor:
        """A part of a held box; a part of a quantised matrix is quantised alone, where the cut allows it."""
        if name != view.name:
            return self._wire.converted(view, self._amax.get(view.name))[name][inner.slices]
        offset = tuple(a + b for a, b in zip(view.offset, inner.offset, strict=True))
        part = ShardView(view.name, view.shape, offset, inner.extent, view.read()[inner.slices])
        return self._wire.converted(part, self._amax.get(view.name))[name]

    @torch.no_grad()
    def _largest(self) -> dict[str, torch.Tensor]:
        """Return the amax, float32 ``[1]``, of each tensor that has one scale, over all ranks; collective.

        The parts of a fused projection share the largest of theirs.
        """
        if self._wire.fp8 != PER_TENSOR:
            return {}
        mine = {
            name: max(float(PER_TENSOR.amax(view.read()).max()) for view in views)
            for name, views in self._views.items()
            if is_quantized(name)
        }
        largest: dict[str, float] = {}
        everyone = self._group.gather(mine)
        for amax_of in everyone:
            for name, value in amax_of.items():
                largest[_fused(name)] = max(value, largest.get(_fused(name), 0.0))
        return {name: torch.tensor([largest[_fused(name)]]) for amax_of in everyone for name in amax_of}


def _fused(name: str) -> str:
    """The projection that an engine fuses a tensor into: its parts get one scale, so that nothing is rounded twice."""
    return re.sub(r"\b([qkv]|gate|up)_proj|\bw[13]\b", lambda match: "qkv" if match[0][0] in "qkv" else "gate_up", name)
