"""The plan of a weight transfer: which rank sends which box of which tensor to whom, in what order. Pure; no torch.

Cells are the finest boxes that neither a sender's nor a receiver's cut goes through. Every cell that an engine rank holds
is sent to it once, by one of the actor ranks that hold it; replicas share the work. Nothing is gathered.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.layouts import Held

GRAIN = 64
"""A cell that replicas can share is cut until no piece is above mean bytes a sender / GRAIN: the heaviest sender is then
within a few hundredths of the mean."""


class Send(NamedTuple):
    """One box of one tensor on its way from one rank."""

    name: str
    box: Box
    sender: int
    receivers: tuple[int, ...]
    """Engine ranks, numbered through all engines."""
    nbytes: int
    """Bytes of one copy of the box."""


@dataclass(frozen=True)
class TransferPlan:
    """All sends, each sender's in the order in which it makes them."""

    sends: tuple[Send, ...]
    senders: int
    receivers: int
    multicast: bool
    """Whether one write serves all receivers of a box (memory, files); else each is sent a copy of its own."""

    @cached_property
    def sent(self) -> list[int]:
        """Bytes that leave each actor rank."""
        return _summed(self.senders, ((s.sender, s.nbytes * (1 if self.multicast else len(s.receivers))) for s in self.sends))

    @cached_property
    def received(self) -> list[int]:
        """Bytes that reach each engine rank."""
        return _summed(self.receivers, ((r, s.nbytes) for s in self.sends for r in s.receivers))

    def seconds(self, sender_gbs: float, receiver_gbs: float) -> float:
        """Predict the seconds at bandwidths in 10^9 bytes/s a rank, with sending and receiving at the same time."""
        return max(max(self.sent) / sender_gbs, max(self.received) / receiver_gbs) / 1e9

    def lower_bound_s(self, sender_gbs: float, receiver_gbs: float) -> float:
        """Return the seconds that no plan can beat: all bytes evenly over all senders, or the fullest receiver."""
        return max(sum(self.sent) / self.senders / sender_gbs, max(self.received) / receiver_gbs) / 1e9


def _summed(size: int, items: Iterable[tuple[int, int]]) -> list[int]:
    total = [0] * size
    for index, nbytes in items:
        total[index] += nbytes
    return total


@contextmanager
def _without_collection() -> Iterator[None]:
    """Stop Python's cyclic collector, which would look through a million live tuples again and again and find nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_without_collection()
def make_plan(
    tensors: dict[str, tuple[int, ...]],
    item_bytes: Mapping[str, int],
    actor: dict[str, Held],
    engines: Sequence[tuple[dict[str, Held], int]],
    senders: int,
    *,
    multicast: bool,
    row_multiple: Mapping[str, int] | None = None,
) -> TransferPlan:
    """Plan a transfer. Every rank derives the same plan from the same arguments.

    Args:
        tensors: Hugging Face name → shape of the whole tensor; the order of the sends.
        item_bytes: bytes of an element of each tensor as it travels.
        actor: holdings of the actor (`layouts.actor_holdings`, or what its ranks report).
        engines: for each engine its holdings and its number of ranks.
        senders: number of actor ranks.
        multicast: whether one copy of a box serves all its receivers (`Transport.multicast`).
        row_multiple: tensors whose boxes are shared out in multiples of so many rows.

    Raises:
        TransferError: a box that an engine holds is held by no actor rank.
    """
    needs = _needs(tensors, engines)
    cells = [(name, *cell) for name in tensors for cell in sorted(_cells(name, actor[name], needs[name]), key=_place)]
    copies = (1 if multicast else len(receivers) for *_, receivers in cells)
    total = sum(box.volume * item_bytes[name] * n for (name, box, _, _), n in zip(cells, copies, strict=True))
    grain, multiples = max(1, total // (senders * GRAIN)), row_multiple or {}
    names: list[str] = []
    boxes: list[Box] = []
    sizes: list[int] = []
    holders_of: list[tuple[int, ...]] = []
    receivers_of: list[tuple[int, ...]] = []
    for name, cell, holders, receivers in cells:
        groups = [receivers] if multicast else [(r,) for r in receivers]
        item, multiple = item_bytes[name], multiples.get(name, 1)
        for box in _cut(cell, grain // item, multiple) if len(holders) > 1 else [cell]:
            count = len(groups)
            names += [name] * count
            boxes += [box] * count
            sizes += [box.volume * item] * count
            holders_of += [holders] * count
            receivers_of += groups
    chosen = _assign(sizes, holders_of, senders)
    sends = tuple(map(Send, names, boxes, chosen, receivers_of, sizes))
    return TransferPlan(sends, senders, sum(ranks for _, ranks in engines), multicast)


def _place(cell: tuple[Box, tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return cell[0].offset


Needs = dict[str, Held]


def _needs(tensors: dict[str, tuple[int, ...]], engines: Sequence[tuple[dict[str, Held], int]]) -> Needs:
    """For each tensor, the boxes that engine ranks need, with those ranks numbered through all engines."""
    needs: Needs = {}
    for name in tensors:
        together: dict[Box, list[int]] = defaultdict(list)
        first = 0
        for holdings, ranks in engines:
            for box, holders in holdings[name]:
                together[box].extend(first + holder for holder in holders)
            first += ranks
        needs[name] = [(box, tuple(ranks)) for box, ranks in together.items()]
    return needs


def _cells(name: str, held: Held, needed: Held) -> list[tuple[Box, tuple[int, ...], tuple[int, ...]]]:
    """The finest boxes of one tensor, each with the ranks that hold it and the ranks that need it.

    Args:
        held: boxes that are equal or apart, as one cut of the actor makes them.
        needed: boxes of any engines, which may overlap.
    """
    cells: dict[Box, tuple[tuple[int, ...], list[int]]] = {}
    # Needed boxes that overlap are cut at each other's edges first. Then boxes on either side are apart from each other, so
    # are the cells that pairs of them share, and no element is in two cells or sent twice to one rank.
    for box, receivers in _disjoint(needed):
        volume = 0
        for source, holders in held:
            if common := box.common(source):
                cells.setdefault(common, (holders, []))[1].extend(receivers)
                volume += common.volume
        # For the same reason volumes decide whether the cells cover the box: what is missing is held by no rank.
        if volume != box.volume:
            raise TransferError(f"{name}: the actor's ranks hold {volume} of the {box.volume} elements at {box.offset}")
    return [(box, holders, tuple(receivers)) for box, (holders, receivers) in cells.items()]


def _disjoint(needed: Held) -> Held:
    """Cut boxes of engines with different cuts further, until any two of them are equal or apart."""
    if len(needed) < 2 or not _overlapping(needed):
        return needed
    edges = [sorted({x for box, _ in needed for x in (box.offset[d], box.offset[d] + box.extent[d])}) for d in _dims(needed)]
    parts: dict[Box, list[int]] = defaultdict(list)
    for box, receivers in needed:
        for piece in _grid(box, edges):
            parts[piece].extend(receivers)
    return [(box, tuple(receivers)) for box, receivers in parts.items()]


def _dims(needed: Held) -> range:
    return range(len(needed[0][0].offset))


def _overlapping(needed: Held) -> bool:
    """Whether boxes may overlap: they hold more elements than the smallest box around them."""
    volume = sum(box.volume for box, _ in needed)
    ends = [max(box.offset[d] + box.extent[d] for box, _ in needed) for d in _dims(needed)]
    starts = [min(box.offset[d] for box, _ in needed) for d in _dims(needed)]
    return volume > math.prod(end - start for start, end in zip(starts, ends, strict=True))


def _grid(box: Box, edges: Sequence[Sequence[int]]) -> list[Box]:
    """Cut a box at the edges of each dimension that go through it."""
    pieces = [Box((), ())]
    for d, marks in enumerate(edges):
        start, end = box.offset[d], box.offset[d] + box.extent[d]
        cuts = [mark for mark in marks if start <= mark <= end]
        pieces = [Box((*piece.offset, a), (*piece.extent, b - a)) for piece in pieces for a, b in itertools.pairwise(cuts)]
    return pieces


def _cut(box: Box, volume: int, multiple: int) -> list[Box]:
    """Cut a box into slabs of rows of about `volume` elements, at multiples of so many rows."""
    rows, width = box.extent[0], max(1, box.volume // max(1, box.extent[0]))
    step = max(1, volume // (width * multiple)) * multiple
    if step >= rows:
        return [box]
    count = -(-rows // step)
    starts = [*(rows * i // count // multiple * multiple for i in range(count)), rows]
    return [Box((box.offset[0] + a, *box.offset[1:]), (b - a, *box.extent[1:])) for a, b in itertools.pairwise(starts) if b > a]


def _assign(sizes: Sequence[int], holders_of: Sequence[tuple[int, ...]], senders: int) -> list[int]:
    """Choose each send's sender: those with the fewest holders first, the largest first, each to its least loaded holder."""
    load = [0] * senders
    chosen = [0] * len(sizes)
    by_holders: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, holders in enumerate(holders_of):
        by_holders[holders].append(index)
    for holders in sorted(by_holders, key=lambda h: (len(h), h)):
        heap = [(load[rank], rank) for rank in holders]
        heapq.heapify(heap)
        for index in sorted(by_holders[holders], key=sizes.__getitem__, reverse=True):
            bytes_so_far, rank = heap[0]
            chosen[index] = rank
            load[rank] = bytes_so_far + sizes[index]
            heapq.heapreplace(heap, (load[rank], rank))
    return chosen
