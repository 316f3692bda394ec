"""Rows to tensors: packed (``thd``) micro-batches without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_hpt.data.rows import Row, Source


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, one after the other. Position i of a row is fed its token i and predicts its token i + 1."""

    tokens: Tensor
    """[1, positions] input ids."""
    positions: Tensor
    """[1, positions] place in the row."""
    targets: Tensor
    """[positions] ids to predict."""
    packing: PackedSeqParams
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


def pack(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    """Pack rows; none gives one inert filler."""
    rows = rows or [FILLER]
    lengths = np.array([len(row.tokens) - 1 for row in rows])
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    tokens, targets, places = (np.empty(total, dtype=np.int64) for _ in range(3))
    floats = {name: np.zeros(total, dtype=np.float32) for name in _FLOATS}
    measured = np.zeros(total, dtype=bool)
    for row, length, end in zip(rows, lengths, ends, strict=True):
        start, response = end - length, slice(end - row.response_length, end)
        tokens[start:end], targets[start:end], places[start:end] = row.tokens[:-1], row.tokens[1:], range(length)
        floats["weights"][response] = row.weight
        floats["advantages"][response] = row.token_advantages if row.token_advantages is not None else row.advantage or 0.0
        floats["row_lengths"][response] = row.response_length
        if row.behaviour_logprobs is not None:
            floats["behaviour_logprobs"][response] = row.behaviour_logprobs
            measured[response] = True
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        positions=torch.from_numpy(places)[None].to(device),
        targets=torch.from_numpy(targets).to(device),
        packing=_packing(ends, int(lengths.max()), device),
        rows=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)).to(device),
        roles=torch.from_numpy(np.repeat([int(row.role) for row in rows], lengths)).to(device),
        measured=torch.from_numpy(measured).to(device),
        **{name: torch.from_numpy(values).to(device) for name, values in floats.items()},
    )


def _packing(ends: np.ndarray, longest: int, device: torch.device) -> PackedSeqParams:
    cumulative = torch.tensor([0, *ends.tolist()], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
