"""Plan micro-batches and the positions of rows in them: pure functions from lengths to indices."""

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

    A row longer than the budget gets a micro-batch of its own. All ranks get the same number of micro-batches, at least one,
    because all ranks and pipeline stages run the same schedule. Some may be empty; the trainer fills them with an inert row.

    Args:
        lengths: tokens of each row.
        ranks: data parallel ranks.
        budget: tokens of one micro-batch.
        attention_parity: length at which a row's attention costs as much as everything else (`attention_parity`).
        count_multiple: the number of micro-batches is a multiple of this, as an interleaved pipeline's schedule wants it.
    """
    costs = [row_cost(length, attention_parity) for length in lengths]
    shares = [_cut(share, lengths, budget) for share in _balance(costs, ranks)]
    count = max(1, *(len(share) for share in shares))
    count += -count % count_multiple
    return [share + [[] for _ in range(count - len(share))] for share in shares]


def row_cost(length: int, attention_parity: float) -> float:
    """Return what a row of so many tokens costs, in tokens of a short row.

    Attention's cost grows with the square of the length, that of everything else with the length; they are equal at parity.
    """
    return length * (1 + length / attention_parity)


def attention_parity(hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, active_experts: int = 1) -> float:
    """Return the tokens of a row at which its causal attention costs as much as the layer's matrix products.

    A token costs 2 FLOPs a parameter. Attention over a row of s tokens costs s²/2 pairs · 4 FLOPs · heads · head_dim
    (scores and weighted values, without the masked upper triangle).

    Args:
        ffn: hidden units of the MLP, or of one expert.
        active_experts: experts that a token goes through; 1 in a dense model.
    """
    parameters = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn * active_experts
    return parameters / (heads * head_dim)


def places(lengths: Sequence[int], row_multiple: int, batch_multiple: int, total: int = 0) -> list[int]:
    """Return how many positions each row of a micro-batch takes, padding included; there is at least one row.

    Each takes a multiple of `row_multiple` positions, all together a multiple of `batch_multiple` and at least `total`. What
    the rows lack of that follows as further rows of padding alone. None of these is longer than the longest row: attention
    costs the square of a row's length, and one long row of padding could cost more than all others.
    """
    slots = [length + -length % row_multiple for length in lengths]
    least = max(total, sum(slots))
    padding = least + -least % batch_multiple - sum(slots)
    longest = max(slots)
    return slots + [min(longest, padding - taken) for taken in range(0, padding, longest)]


def context_slice(slots: Sequence[int], size: int, rank: int) -> np.ndarray:
    """Return the positions of a micro-batch that a context parallel rank holds, in its order; int64.

    Every row is cut into 2 · size equal pieces, and rank r holds pieces r and 2 · size - 1 - r. An early and a late piece
    together cost every rank the same causal attention (Megatron-Core's and Transformer Engine's layout).

    Args:
        slots: positions of each row, multiples of 2 · size.
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
    """Give the dearest row left to the rank with the least to do, until none is left (Graham's LPT rule)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return shares


def _cut(share: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a rank's rows, dearest first, into micro-batches; those of one micro-batch are therefore of similar length."""
    micro_batches: list[list[int]] = []
    room = 0
    for index in share:
        if not micro_batches or lengths[index] > room:
            micro_batches.append([])
            room = budget
        micro_batches[-1].append(index)
        room -= lengths[index]
    return micro_batches
