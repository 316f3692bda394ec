"""Planning micro-batches: pure functions from lengths to indices."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]
"""[data parallel rank][micro-batch][row index]; every rank has the same number of micro-batches."""


def plan_micro_batches(lengths: Sequence[int], ranks: int, budget: int) -> Plan:
    """Spread rows over data parallel ranks by tokens, and cut each share into micro-batches of at most `budget`.

    A row longer than the budget gets a micro-batch of its own. Ranks with fewer micro-batches get empty ones (the
    trainer fills them with inert rows), so all ranks and pipeline stages run the same schedule; there is always at
    least one.

    Args:
        lengths: tokens of each row.
        ranks: data parallel ranks.
        budget: tokens of one micro-batch.
    """
    shares = [_cut(share, lengths, budget) for share in _balance(lengths, ranks)]
    most = max(1, *(len(share) for share in shares))
    return [share + [[] for _ in range(most - len(share))] for share in shares]


def _balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Longest row first to the rank with the fewest tokens (Graham's LPT rule)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + lengths[index], rank))
    return shares


def _cut(share: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in falling length into micro-batches, so that rows of one micro-batch are of similar length."""
    micro_batches: list[list[int]] = []
    room = 0
    for index in share:
        if not micro_batches or lengths[index] > room:
            micro_batches.append([])
            room = budget
        micro_batches[-1].append(index)
        room -= lengths[index]
    return micro_batches
