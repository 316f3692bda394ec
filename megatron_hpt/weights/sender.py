"""The trainer's side of the weight transfer: every rank contributes the shards it holds.

Each rank copies its own shards, under their Hugging Face names, into its own segment. Rank 0 collects the lists of
pieces (names and places, no weights), makes the manifest and tells every engine. No tensor is gathered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_hpt.errors import HptError, TransferError
from megatron_hpt.weights.control import VllmControl
from megatron_hpt.weights.manifest import Manifest, Piece, check_complete, checksum
from megatron_hpt.weights.mapping import ShardView
from megatron_hpt.weights.transports.shared_memory import SenderSegment, aligned

logger = logging.getLogger(__name__)


def lay_out(views: Iterable[ShardView]) -> tuple[list[Piece], int]:
    """Places of `views` in one segment.

    Returns:
        The pieces (segment 0, checksum 0: not known yet) and the bytes of the segment.
    """
    pieces, position = [], 0
    for view in views:
        nbytes = math.prod(view.extent) * view.view.element_size()
        dtype = str(view.view.dtype).removeprefix("torch.")
        pieces.append(Piece(view.name, view.shape, dtype, view.offset, view.extent, 0, position, nbytes, 0))
        position = aligned(position + nbytes)
    return pieces, position


class WeightSender:
    """Publishes versions of the actor's weights to engines; collective over `group`."""

    def __init__(
        self,
        views: Sequence[ShardView],
        expected: dict[str, tuple[int, ...]],
        engines: Sequence[str],
        deadline_s: float,
        group: dist.ProcessGroup,
    ) -> None:
        """Lay out this rank's segment.

        Args:
            views: the shards that this rank contributes; empty on replicas.
            expected: HF name → shape of the complete model.
            engines: URLs of the engines.
            group: all trainer ranks, on a backend that moves Python objects on the host (gloo).
        """
        self._views, self._expected, self._group = list(views), expected, group
        self._pieces, nbytes = lay_out(self._views)
        self._segment = SenderSegment(nbytes)
        self._is_lead = dist.get_rank(group) == 0
        self._engines = [VllmControl(url, deadline_s) for url in engines] if self._is_lead else []
        self._manifest: Manifest | None = None
        """What was published last; the segments still hold it."""

    def publish(self, version: int) -> int:
        """Bring every engine to `version`.

        Returns:
            Bytes of the version's weights, on every rank.

        Raises:
            HptError: on every rank, with what rank 0 met.
        """
        mine = (self._segment.description, self._write())
        collected: list | None = [None] * dist.get_world_size(self._group) if self._is_lead else None
        dist.gather_object(mine, collected, dst=0, group=self._group)
        outcome: list = [None]
        if collected is not None:
            self._manifest = self._collected(version, collected)
            outcome = [self._drive(self._manifest, self._engines)]
        return self._shared(outcome)

    def renew(self, url: str) -> None:
        """Bring one engine, which was started again, to the version that was published last; collective.

        Raises:
            HptError: on every rank, with what rank 0 met.
        """
        outcome: list = [0]
        if self._manifest is not None:  # else it gets its first version with all others
            outcome = [self._drive(self._manifest, [engine for engine in self._engines if engine.url == url])]
        self._shared(outcome)

    def close(self) -> None:
        """Free the segment and the connections."""
        for engine in self._engines:
            engine.close()
        self._segment.close()

    def _shared(self, outcome: list) -> int:
        """What rank 0 has for all ranks."""
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], HptError):
            raise outcome[0]
        return outcome[0]

    @torch.no_grad()
    def _write(self) -> list[Piece]:
        return [
            replace(piece, crc32=checksum(self._segment.put(piece.position, view.read())))
            for piece, view in zip(self._pieces, self._views, strict=True)
        ]

    @staticmethod
    def _collected(version: int, collected: list) -> Manifest:
        pieces = [replace(p, segment=index) for index, (_, pieces) in enumerate(collected) for p in pieces]
        return Manifest(version, tuple(segment for segment, _ in collected), tuple(pieces))

    def _drive(self, manifest: Manifest, engines: Sequence[VllmControl]) -> int | HptError:
        """Errors are returned, not raised: the other ranks wait for the outcome."""
        try:
            check_complete(manifest, self._expected)
            for engine in engines:
                self._bring(engine, manifest)
        except HptError as error:
            return error
        except (KeyError, ValueError) as error:
            return TransferError(f"version {manifest.version}: an engine answered what cannot be read: {error!r}")
        return manifest.nbytes

    @staticmethod
    def _bring(engine: VllmControl, manifest: Manifest) -> None:
        """Update an engine, if it is there: one that is gone is started again and then asks for its weights itself.

        Raises:
            HptError: it is there, and the update failed.
        """
        try:
            if engine.version() == str(manifest.version):
                return  # it came back in time for the version that all got; another update would disturb its requests
            engine.prepare()  # every time: it may have been started again since
            engine.update(manifest)
        except HptError as error:
            try:
                engine.version()
            except HptError:
                logger.warning("engine %s is gone, version %d goes on without it: %s", engine.url, manifest.version, error)
            else:
                raise error from None
