"""The trainer's side of the weight transfer: every rank contributes boxes that it holds, as the plan says.

Each rank copies its own boxes, under their Hugging Face names, to where the transport wants them. Rank 0 collects their
checksums (no weights), makes the manifest and drives all engines at once. No tensor is gathered.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_hpt.errors import EngineGone, HptError, TransferError
from megatron_hpt.weights.boxes import Box
from megatron_hpt.weights.control import EngineControl
from megatron_hpt.weights.hf_config import ModelShape
from megatron_hpt.weights.layouts import EngineLayout, Held, engine_holdings
from megatron_hpt.weights.manifest import Contents, Manifest, Piece
from megatron_hpt.weights.mapping import ShardView, hf_tensor_shapes
from megatron_hpt.weights.plan import Plan, make_plan
from megatron_hpt.weights.transports import SENDERS


@dataclass(frozen=True)
class Target:
    """One engine that is to be served."""

    control: EngineControl
    layout: EngineLayout


def session_name() -> str:
    """A name for one trainer from start to end, that a person can place."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


class WeightSender:
    """Publishes versions of the actor's weights to engines; collective over `group`."""

    def __init__(
        self,
        views: Sequence[ShardView],
        shape: ModelShape,
        targets: Sequence[Target],
        group: dist.ProcessGroup,
        *,
        transport: str = "shared_memory",
        compare_every: int = 50,
    ) -> None:
        """Plan the transfer and lay out this rank's part of it.

        Args:
            views: every box that this rank holds, replicas included (`actor.model.views`).
            targets: all engines; connections are used on rank 0 only.
            group: all trainer ranks, on a backend that moves Python objects on the host (gloo).
            compare_every: versions after which engines compare their weights with what was sent; the first always.
        """
        self._group, self._rank = group, dist.get_rank(group)
        self._targets, self._compare_every = list(targets), compare_every
        self._tensors = hf_tensor_shapes(shape)
        self._views = {view.name: [] for view in views}
        for view in views:
            self._views[view.name].append(view)
        dtype = next(iter(views)).view.dtype
        self.plan = self._make_plan(shape, dtype)
        self._mine = self.plan.by_sender().get(self._rank, [])
        self._sink = SENDERS[transport]([send.nbytes for send in self._mine])
        self._contents = self._collect_contents(transport, str(dtype).removeprefix("torch."))
        self._prepared: set[str] = set()
        self._last: Manifest | None = None

    def publish(self, version: int) -> int:
        """Bring every engine to `version`.

        An engine that is gone is left out, as long as one remains; any other failure is raised.

        Returns:
            Bytes of the version's weights, on every rank.

        Raises:
            HptError: on every rank, with what rank 0 met.
        """
        with torch.no_grad():
            checksums = [self._sink.put(i, self._source(send.name, send.box)) for i, send in enumerate(self._mine)]
        self._sink.commit(version)
        everyone: list | None = [None] * dist.get_world_size(self._group) if self._rank == 0 else None
        dist.gather_object(checksums, everyone, dst=0, group=self._group)
        if everyone is not None:
            compare = self._last is None or version % self._compare_every == 0
            flat = tuple(checksum for own in everyone for checksum in own)
            self._last = Manifest(self._contents.session, self._contents.digest, version, flat, compare)
        self._agree_on(lambda: self._serve(self._targets))
        return self._contents_nbytes

    def renew(self, url: str) -> None:
        """Give one engine, which came back without weights, the version that was published last.

        Raises:
            HptError: on every rank.
        """
        self._prepared.discard(url)
        self._agree_on(lambda: self._serve([target for target in self._targets if target.control.url == url]))

    def close(self) -> None:
        """Free what the transport holds and the connections."""
        for target in self._targets:
            target.control.close()
        self._sink.close()

    def _make_plan(self, shape: ModelShape, dtype: torch.dtype) -> Plan:
        mine = [(view.name, Box(view.offset, view.extent)) for views in self._views.values() for view in views]
        everyone: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        held: dict[str, dict[Box, list[int]]] = {name: {} for name in self._tensors}
        for rank, boxes in enumerate(everyone):
            for name, box in boxes:
                held[name].setdefault(box, []).append(rank)
        actor: dict[str, Held] = {n: [(box, tuple(ranks)) for box, ranks in found.items()] for n, found in held.items()}
        layouts = {target.layout for target in self._targets}
        holdings = {layout: engine_holdings(self._tensors, shape, layout) for layout in layouts}
        engines = [(holdings[target.layout], target.layout.ranks) for target in self._targets]
        return make_plan(self._tensors, dtype.itemsize, actor, engines, len(everyone), multicast=True)

    def _collect_contents(self, transport: str, dtype: str) -> Contents | None:
        """The contents on rank 0; every rank knows their size."""
        positions = self._sink.positions
        everyone: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, (self._sink.source, positions), group=self._group)
        self._contents_nbytes = sum(send.nbytes for send in self.plan.sends)
        if self._rank:
            return None
        sends = self.plan.by_sender()
        pieces = [
            Piece(send.name, send.box, rank, position, send.nbytes)
            for rank, (_, places) in enumerate(everyone)
            for send, position in zip(sends.get(rank, []), places, strict=True)
        ]
        sources = tuple(source for source, _ in everyone)
        return Contents(session_name(), transport, dtype, self._tensors, sources, tuple(pieces))

    def _source(self, name: str, box: Box) -> torch.Tensor:
        """The box of a tensor, out of the local parameters; a copy only where layouts differ."""
        for view in self._views[name]:
            own = Box(view.offset, view.extent)
            if own == box:
                return view.view
            if own.common(box) == box:
                return view.read()[box.inside(own).slices]
        raise TransferError(f"{name} at {box.offset} is not held by rank {self._rank}, which was to send it")

    def _agree_on(self, action) -> None:
        """Rank 0 acts; what it meets is raised on all ranks, which wait for the outcome."""
        outcome: list = [None]
        if self._rank == 0:
            try:
                action()
            except HptError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], HptError):
            raise outcome[0]

    def _serve(self, targets: Sequence[Target]) -> None:
        with ThreadPoolExecutor(max(1, len(targets))) as pool:
            outcomes = list(pool.map(self._serve_one, targets))
        gone = [error for error in outcomes if isinstance(error, EngineGone)]
        failed = [error for error in outcomes if error is not None and error not in gone]
        if failed or len(gone) == len(targets):
            raise (failed or gone)[0]

    def _serve_one(self, target: Target) -> HptError | None:
        control, manifest = target.control, self._last
        try:
            if manifest is None:
                raise TransferError(f"{control.url} asked for weights before any were published")
            fresh = control.url not in self._prepared
            if fresh:
                control.prepare(self._contents)
            control.update(Manifest(**{**vars(manifest), "compare": manifest.compare or fresh}))
            self._prepared.add(control.url)
        except HptError as error:
            self._prepared.discard(control.url)
            return error
        except (KeyError, ValueError) as error:
            return TransferError(f"engine {control.url} answered what cannot be read: {error!r}")
        return None
