"""Rows to tensors: packed (``thd``) micro-batches without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hpt.actor.packing import RowPacking
from megatron_hpt.data.packing import context_slice, padded_lengths
from megatron_hpt.data.rows import Row, Source


@dataclass(frozen=True)
class Cut:
    """What the layout asks of a micro-batch."""

    row_multiple: int = 1
    batch_multiple: int = 1
    context_size: int = 1
    context_rank: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, one after the other. Position i of a row is fed its token i and predicts its token i + 1."""

    tokens: Tensor
    """[1, local positions] input ids; what is local belongs to this context parallel rank."""
    positions: Tensor
    """[1, local positions] place in the row."""
    targets: Tensor
    """[local positions] ids to predict."""
    predicted: Tensor
    """Indices of the local positions that predict a response token."""
    packing: RowPacking
    rows: Tensor
    """[positions] index of the row here; this and all of the following lie with the position that predicts the token."""
    roles: Tensor
    """[positions] `Role` of the row."""
    behaviour_logprobs: Tensor
    """[positions]; this and all of the following are zero or False outside the trained or measured response."""
    advantages: Tensor
    weights: Tensor
    row_lengths: Tensor
    measured: Tensor
    """bool: a rollout's response token, whose engine log-probability is known."""


_FLOATS = ("behaviour_logprobs", "advantages", "weights", "row_lengths")
FILLER = Row("", 0, Source.DEMONSTRATION, (0, 0), 1, None, None, None, 0.0, None)
"""A row that keeps a rank busy when others have more micro-batches; its weight of 0 makes its gradient exactly zero."""


def pack(rows: Sequence[Row], device: torch.device, cut: Cut) -> MicroBatch:
    """Pack rows; none gives one inert filler."""
    rows = rows or [FILLER]
    lengths = [len(row.tokens) - 1 for row in rows]
    slots = padded_lengths(lengths, cut.row_multiple, cut.batch_multiple)
    starts = np.cumsum([0, *slots])
    total = int(starts[-1])
    tokens, targets, places = (np.zeros(total, dtype=np.int64) for _ in range(3))
    responses = np.zeros(total, dtype=bool)
    floats = {name: np.zeros(total, dtype=np.float32) for name in _FLOATS}
    measured = np.zeros(total, dtype=bool)
    for row, length, start in zip(rows, lengths, starts, strict=False):
        end = start + length
        response = slice(end - row.response_length, end)
        tokens[start:end], targets[start:end], places[start:end] = row.tokens[:-1], row.tokens[1:], range(length)
        responses[response] = True
        floats["weights"][response] = row.weight
        floats["advantages"][response] = row.token_advantages if row.token_advantages is not None else row.advantage or 0.0
        floats["row_lengths"][response] = row.response_length
        if row.behaviour_logprobs is not None:
            floats["behaviour_logprobs"][response] = row.behaviour_logprobs
            measured[response] = True
    local = context_slice(slots, cut.context_size, cut.context_rank)
    return MicroBatch(
        tokens=torch.from_numpy(tokens[local])[None].to(device),
        positions=torch.from_numpy(places[local])[None].to(device),
        targets=torch.from_numpy(targets[local]).to(device),
        predicted=torch.from_numpy(responses[local].nonzero()[0]).to(device),
        packing=RowPacking.of(slots, cut.context_size, cut.context_rank, device),
        rows=torch.from_numpy(np.repeat(np.arange(len(rows)), slots)).to(device),
        roles=torch.from_numpy(np.repeat([int(row.role) for row in rows], slots)).to(device),
        measured=torch.from_numpy(measured).to(device),
        **{name: torch.from_numpy(values).to(device) for name, values in floats.items()},
    )


def ends_of(lengths: Sequence[int], cut: Cut) -> list[int]:
    """Where rows of so many tokens end in their micro-batch, padding not counted."""
    if not lengths:
        return []
    starts = np.cumsum([0, *padded_lengths(lengths, cut.row_multiple, cut.batch_multiple)[:-1]])
    return [int(start) + length for start, length in zip(starts, lengths, strict=True)]
