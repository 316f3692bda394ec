"""The engine's side of the weight transfer, without the engine: open, verify, assemble.

Imports no engine, so it is tested alone; `vllm_plugin` hands its tensors to vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.manifest import Manifest, Piece, check_complete, checksum
from megatron_hpt.weights.transports.shared_memory import ReceiverSegment


class Receiver:
    """Takes in manifests; keeps the senders' segments mapped between versions."""

    def __init__(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Args: expected: HF name → shape of every tensor that a version must bring."""
        self._expected = expected
        self._segments: dict = {}

    def verify(self, manifest: Manifest) -> None:
        """Check names, shapes, tiling and the checksum of every piece, before anything is loaded.

        Raises:
            TransferError: naming the tensor and what is wrong with it.
        """
        check_complete(manifest, self._expected)
        self._segments = {s: self._segments.get(s) or ReceiverSegment(s) for s in manifest.segments}
        for piece in manifest.pieces:
            found = checksum(self._source(manifest, piece).view(piece.position, piece.nbytes))
            if found != piece.crc32:
                raise TransferError(
                    f"version {manifest.version}: {piece.name} at {piece.offset} arrived damaged "
                    f"(CRC-32 {found:08x}, the manifest says {piece.crc32:08x})"
                )

    def tensors(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """Whole HF tensors of a verified manifest, one at a time; a tensor of one piece is read in place."""
        for name, pieces in manifest.by_tensor().items():
            if len(pieces) == 1:
                yield name, self._tensor(manifest, pieces[0])
                continue
            whole = torch.empty(pieces[0].shape, dtype=getattr(torch, pieces[0].dtype))
            for piece in pieces:
                box = tuple(slice(o, o + e) for o, e in zip(piece.offset, piece.extent, strict=True))
                whole[box] = self._tensor(manifest, piece)
            yield name, whole

    def close(self) -> None:
        """Unmap the senders' memory."""
        self._segments = {}

    def _source(self, manifest: Manifest, piece: Piece) -> ReceiverSegment:
        return self._segments[manifest.segments[piece.segment]]

    def _tensor(self, manifest: Manifest, piece: Piece) -> Tensor:
        dtype = getattr(torch, piece.dtype)
        return self._source(manifest, piece).tensor(piece.position, piece.nbytes, dtype, piece.extent)
