"""From the layouts of actor and engines: the boxes that each rank sends, and the contents that each engine is told."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hpt.models.mapping import ShardView
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.layouts import EngineLayout, Held, engine_holdings
from megatron_hpt.transfer.manifest import Contents, Piece
from megatron_hpt.transfer.plan import Send, TransferPlan, make_plan
from megatron_hpt.transfer.sending.group import TrainerGroup
from megatron_hpt.transfer.transports import TRANSPORTS, Sink
from megatron_hpt.transfer.wire_format import Wire


class Routes:
    """The plan of all ranks, seen from this one. Engines are named by their place among the layouts."""

    def __init__(
        self,
        group: TrainerGroup,
        wire: Wire,
        views: Sequence[ShardView],
        layouts: Sequence[EngineLayout],
        transport: str,
    ) -> None:
        """Plan; collective.

        Args:
            views: every box that this rank holds, replicas included.
            layouts: how each engine is cut.

        Raises:
            TransferError: on every rank, an engine's box that no rank holds, or ranks that hold parts of FP8 blocks.
        """
        self._group, self._wire, self._layouts = group, wire, layouts
        self._transport, self._talks = transport, TRANSPORTS[transport].meets
        self.plan = self._make_plan(views)
        self.boxes = list(dict.fromkeys((send.name, send.box) for send in self.plan.sends if send.sender == group.rank))
        """Boxes that this rank sends, each once: one copy serves all messages that carry it."""

    def _make_plan(self, views: Sequence[ShardView]) -> TransferPlan:
        wire, tensors = self._wire, self._wire.tensors
        held: dict[str, dict[Box, list[int]]] = {name: {} for name in tensors}
        for rank, boxes in enumerate(self._group.gather([box for view in views for box in wire.boxes_of(view)])):
            for name, box in boxes:
                held[name].setdefault(box, []).append(rank)
        wire.check_cuts(held)
        actor: dict[str, Held] = {n: [(box, tuple(ranks)) for box, ranks in boxes.items()] for n, boxes in held.items()}
        holdings = {layout: engine_holdings(tensors, wire.shape, layout) for layout in set(self._layouts)}
        return make_plan(
            tensors,
            wire.item_bytes,
            actor,
            [(holdings[layout], layout.ranks) for layout in self._layouts],
            self._group.size,
            multicast=TRANSPORTS[self._transport].multicast,
            row_multiple=wire.row_multiple,
        )

    def settle(self, session: str, sink: Sink) -> None:
        """Learn where every rank's boxes lie, once its sending end is open; collective. Contents can be made from then on."""
        ends = self._group.gather((sink.source, self.boxes, sink.positions))
        self._session = session
        self._positions = [dict(zip(boxes, positions, strict=True)) for _, boxes, positions in ends]
        self._sources = tuple(source for source, _, _ in ends)

    def contents(self, engine: int | None) -> Contents:
        """Return what an engine has to know before its first version; None: about all sends, which ``files`` writes down."""
        pieces = tuple(
            Piece(s.name, s.box, s.sender, self._positions[s.sender][s.name, s.box], s.nbytes, ranks if self._talks else ())
            for s, ranks in self._sends(engine)
        )
        return Contents(self._session, self._transport, self._wire.dtype, self._wire.tensors, self._sources, pieces)

    def messages(self, engine: int) -> list[tuple[int, int, int]]:
        """What this rank sends to an engine, as `Messages.transmit` takes it: (box, piece, rank in the group of both)."""
        numbers = {box: i for i, box in enumerate(self.boxes)}
        return [
            (numbers[send.name, send.box], piece, self._group.size + rank)
            for piece, (send, ranks) in enumerate(self._sends(engine))
            if send.sender == self._group.rank
            for rank in ranks
        ]

    def _sends(self, engine: int | None) -> list[tuple[Send, tuple[int, ...]]]:
        """Sends that concern an engine (None: all) in the global order, with its ranks that receive each."""
        if engine is None:
            return [(send, ()) for send in self.plan.sends]
        first = sum(layout.ranks for layout in self._layouts[:engine])
        ranks_of_engine = range(first, first + self._layouts[engine].ranks)
        with_ranks = ((send, tuple(r - first for r in send.receivers if r in ranks_of_engine)) for send in self.plan.sends)
        return [(send, ranks) for send, ranks in with_ranks if ranks]
