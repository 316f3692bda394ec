"""Rows to tensors: packed (``thd``) micro-batches without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_hpt.batch.packing import context_slice, places
from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.errors import DataError


@dataclass(frozen=True)
class MicroBatchLayout:
    """What the layout asks of a micro-batch."""

    row_multiple: int = 1
    batch_multiple: int = 1
    context_size: int = 1
    context_rank: int = 0
    equal: bool = False
    """All micro-batches of a step have the same number of positions."""
    routers: tuple[int, int, int] = (0, 0, 0)
    """Layers, top-k and experts of a mixture of experts; 0: a dense model, which ignores recorded routes."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, one after the other. Position i of a row is fed its token i and predicts its token i + 1."""

    tokens: Tensor
    """[1, local positions] input ids; what is local belongs to this context parallel rank."""
    positions: Tensor
    """[1, local positions] place in the row."""
    targets: Tensor
    """[local positions] ids to predict."""
    length: int
    """Positions over all context parallel ranks."""
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


def pack(rows: Sequence[Row], device: torch.device, cut: MicroBatchLayout, total: int = 0) -> MicroBatch:
    """Pack rows, with padding to `total` positions where they have fewer; no row gives one inert filler."""
    rows = rows or [FILLER]
    lengths = [len(row.tokens) - 1 for row in rows]
    slots = places(lengths, cut.row_multiple, cut.batch_multiple, total)
    starts = np.cumsum([0, *slots])
    length = int(starts[-1])
    tokens, targets, positions = (np.zeros(length, dtype=np.int64) for _ in range(3))
    responses = np.zeros(length, dtype=bool)
    floats = {name: np.zeros(length, dtype=np.float32) for name in _FLOATS}
    measured = np.zeros(length, dtype=bool)
    for row, own, start in zip(rows, lengths, starts, strict=False):
        end = start + own
        response = slice(end - row.response_length, end)
        tokens[start:end], targets[start:end], positions[start:end] = row.tokens[:-1], row.tokens[1:], range(own)
        responses[response] = True
        floats["weights"][response] = row.weight
        floats["advantages"][response] = row.token_advantages if row.token_advantages is not None else row.advantage or 0.0
        floats["row_lengths"][response] = row.response_length
        if row.behaviour_logprobs is not None:
            floats["behaviour_logprobs"][response] = row.behaviour_logprobs
            measured[response] = True
    owner = np.repeat(np.minimum(np.arange(len(slots)), len(rows) - 1), slots)  # padding goes with the last row
    local = context_slice(slots, cut.context_size, cut.context_rank)
    return MicroBatch(
        tokens=torch.from_numpy(tokens[local])[None].to(device),
        positions=torch.from_numpy(positions[local])[None].to(device),
        targets=torch.from_numpy(targets[local]).to(device),
        length=length,
        predicted=torch.from_numpy(responses[local].nonzero()[0]).to(device),
        packing=RowPacking.of(slots, cut.context_size, cut.context_rank, device, _routes(rows, starts, local, cut, device)),
        rows=torch.from_numpy(owner).to(device),
        roles=torch.from_numpy(np.array([int(row.role) for row in rows])[owner]).to(device),
        measured=torch.from_numpy(measured).to(device),
        **{name: torch.from_numpy(values).to(device) for name, values in floats.items()},
    )


def _routes(
    rows: Sequence[Row], starts: np.ndarray, local: np.ndarray, cut: MicroBatchLayout, device: torch.device
) -> Tensor | None:
    """[layers, local positions, top-k] of the rows' recorded experts, -1 elsewhere; None where no row has any.

    Raises:
        DataError: routes of another length than the row's, or of experts that the model does not have.
    """
    layers, topk, experts = cut.routers
    if not layers or all(row.routes is None for row in rows):
        return None
    routes = np.full((int(starts[-1]), layers, topk), -1, dtype=np.int64)
    for row, start in zip(rows, starts, strict=False):
        if row.routes is None:
            continue
        recorded, fed = np.frombuffer(row.routes, dtype=np.int16), len(row.tokens) - 1
        if recorded.size != fed * layers * topk or recorded.min() < 0 or recorded.max() >= experts:
            raise DataError(
                f"prompt {row.prompt_id}: {recorded.size} recorded routes of experts {recorded.min()} to {recorded.max()}; "
                f"this model needs {fed} tokens × {layers} layers × {topk} of experts 0 to {experts - 1}. "
                "Was the row sampled from another model?"
            )
        routes[start : start + fed] = recorded.reshape(fed, layers, topk)
    return torch.from_numpy(np.ascontiguousarray(routes[local].swapaxes(0, 1))).to(device)


def pack_all(
    rows: Sequence[Row], plan: Sequence[Sequence[int]], device: torch.device, cut: MicroBatchLayout
) -> list[MicroBatch]:
    """The micro-batches of one data parallel rank.

    Args:
        plan: indices of rows of each.
    """
    chosen = [[rows[index] for index in indices] for indices in plan]
    totals = [sum(places([len(row.tokens) - 1 for row in part or [FILLER]], cut.row_multiple, 1)) for part in chosen]
    return [pack(part, device, cut, max(totals) if cut.equal else 0) for part in chosen]


def ends_of(lengths: Sequence[int], cut: MicroBatchLayout) -> list[int]:
    """Where rows of so many tokens end in their micro-batch, padding not counted."""
    slots = [length + -length % cut.row_multiple for length in lengths]
    return [end - slot + length for end, slot, length in zip(itertools.accumulate(slots), slots, lengths, strict=True)]


@dataclass
class RowPacking(PackedSeqParams):
    """`PackedSeqParams` of rows that lie one after the other; the indices are made once a micro-batch, not once a layer."""

    slots: tuple[int, ...] = ()
    """Places of each row, padding included."""
    context_size: int = 1
    context_rank: int = 0
    routes: Tensor | None = None
    """[layers, local positions, top-k] experts to route by, -1 where routing is live; None: it is everywhere."""

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        context_size: int,
        context_rank: int,
        device: torch.device,
        routes: Tensor | None = None,
    ) -> RowPacking:
        """Rows with so many places each, cut over the context parallel ranks."""
        cumulative = torch.tensor([0, *np.cumsum(slots)], dtype=torch.int32, device=device)
        longest = max(slots)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            cu_seqlens_q_padded=cumulative if context_size > 1 else None,
            cu_seqlens_kv_padded=cumulative if context_size > 1 else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            slots=tuple(slots),
            context_size=context_size,
            context_rank=context_rank,
            routes=routes,
        )

    @cached_property
    def unsliced(self) -> Tensor:
        """[tokens]: where each packed position lies in the concatenation of all context parallel ranks' parts."""
        order = np.concatenate([context_slice(self.slots, self.context_size, rank) for rank in range(self.context_size)])
        return torch.from_numpy(np.argsort(order)).to(self.cu_seqlens_q.device)

    @cached_property
    def masks(self) -> list[Tensor]:
        """Of each row, [slots / context_size, slots] bool: which places of the row each local query may look at."""
        local = torch.from_numpy(context_slice(self.slots, self.context_size, self.context_rank))
        parts = local.split([slot // self.context_size for slot in self.slots])
        starts = np.cumsum([0, *self.slots])
        device = self.cu_seqlens_q.device
        return [
            (part[:, None] - int(start) >= torch.arange(slot)).to(device)
            for part, start, slot in zip(parts, starts, self.slots, strict=False)
        ]
