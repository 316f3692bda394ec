"""Planning micro-batches and the places of rows in them: pure functions from lengths to indices."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Plan = list[list[list[int]]]
"""[data parallel rank][micro-batch][row index]; every rank has the same number of micro-batches."""


def plan_micro_batches(
    lengths: Sequence[int], ranks: int, budget: int, *, attention_parity: float = float("inf"), count_multiple: int = 1
) -> Plan:
    """Spread rows over data parallel ranks by cost, and cut each share into micro-batches of at most `budget` tokens.

    A row longer than the budget gets a micro-batch of its own. Ranks with fewer micro-batches get empty ones (the
    trainer fills them with inert rows), so all ranks and pipeline stages run the same schedule; there is always at
    least one.

    Args:
        lengths: tokens of each row.
        ranks: data parallel ranks.
        budget: tokens of one micro-batch.
        attention_parity: length at which a row's attention costs as much as everything else (`attention_parity`).
        count_multiple: the number of micro-batches is a multiple of this (an interleaved pipeline's schedule).
    """
    costs = [length * (1 + length / attention_parity) for length in lengths]
    shares = [_cut(share, lengths, budget) for share in _balance(costs, ranks)]
    most = max(1, *(len(share) for share in shares))
    most += -most % count_multiple
    return [share + [[] for _ in range(most - len(share))] for share in shares]


def attention_parity(hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, active_experts: int = 1) -> float:
    """Tokens of a row at which its causal attention costs as much as the layer's matrix products.

    A token costs 2 FLOPs a parameter; attention over a row of s tokens costs s²/2 pairs · 4 FLOPs · heads · head_dim
    (scores and weighted values, the upper triangle left out).
    """
    parameters = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn * active_experts
    return parameters / (heads * head_dim)


def places(lengths: Sequence[int], row_multiple: int, batch_multiple: int, total: int = 0) -> list[int]:
    """Places of the rows of one micro-batch: each a multiple of `row_multiple`, together one of `batch_multiple`.

    What the sum lacks follows as further rows of padding alone, none longer than the longest row, so that they cost no
    more than their tokens.

    Args:
        total: at least so many places together.
    """
    slots = [length + -length % row_multiple for length in lengths]
    wanted = max(total, sum(slots))
    lacking = wanted + -wanted % batch_multiple - sum(slots)
    longest = max(slots)
    return slots + [min(longest, lacking - taken) for taken in range(0, lacking, longest)]


def context_slice(slots: Sequence[int], size: int, rank: int) -> np.ndarray:
    """Packed positions that a context parallel rank holds, in its order.

    Every row is cut into 2 · size equal pieces, and rank r holds pieces r and 2 · size - 1 - r: one early and one late
    piece, so that causal attention costs every rank the same (Megatron-Core's and Transformer Engine's layout).
    """
    if size == 1:
        return np.arange(sum(slots))
    pieces = []
    for end, slot in zip(np.cumsum(slots), slots, strict=True):
        start, piece = end - slot, slot // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(np.arange(start + index * piece, start + (index + 1) * piece))
    return np.concatenate(pieces)


def _balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Dearest row first to the rank with the least to do (Graham's LPT rule)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
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
