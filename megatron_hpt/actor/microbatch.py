"""From rows to the tensors of packed micro-batches (``thd``): rows lie one after the other in one sequence.

`pack_all` is called by a training step with the plan of `batch.packing`. What it gives lies on this rank's device: inputs
and targets are cut over the context parallel ranks, what the objective reads is not.
"""

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
    """How a run's parallel layout, precision and model shape the micro-batches of a rank."""

    row_multiple: int = 1
    """Every row is padded to a multiple of so many positions."""
    batch_multiple: int = 1
    """Every micro-batch is padded to a multiple of so many positions."""
    context_size: int = 1
    context_rank: int = 0
    equal: bool = False
    """All micro-batches of a step have the same number of positions."""
    routers: tuple[int, int, int] = (0, 0, 0)
    """Layers, top-k and experts of a mixture of experts; zeros for a dense model, which ignores recorded routes."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, one after the other. Position i of a row is fed its token i and predicts its token i + 1.

    Tensors of [local positions] hold this context parallel rank's positions, those of [positions] the whole micro-batch.
    """

    tokens: Tensor
    """int64 [1, local positions]: input ids."""
    positions: Tensor
    """int64 [1, local positions]: the position within its row."""
    targets: Tensor
    """int64 [local positions]: ids to predict."""
    length: int
    """Positions of the whole micro-batch."""
    predicted: Tensor
    """int64: indices of the local positions that predict a response token."""
    packing: RowPacking
    rows: Tensor
    """int64 [positions]: index of the row in this micro-batch. What belongs to a token lies where it is predicted."""
    roles: Tensor
    """int64 [positions]: `Role` of the row."""
    behaviour_logprobs: Tensor
    """float32 [positions]; this and all of the following are zero or False outside the response."""
    advantages: Tensor
    weights: Tensor
    row_lengths: Tensor
    """Response tokens of the row."""
    measured: Tensor
    """bool [positions]: a rollout's response token, whose log-probability under the engine is known."""


@dataclass
class RowPacking(PackedSeqParams):
    """Megatron's `PackedSeqParams`, with what `model.attention` and `model.routing` read of a micro-batch in every layer.

    It is made once a micro-batch, so indices are computed once and not in every layer.
    """

    slots: tuple[int, ...] = ()
    """Positions of each row, padding included."""
    context_size: int = 1
    context_rank: int = 0
    routes: Tensor | None = None
    """int64 [layers, local positions, top-k]: experts to route by, -1 where routing is live; None if it is live everywhere."""

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        context_size: int,
        context_rank: int,
        device: torch.device,
        routes: Tensor | None = None,
    ) -> RowPacking:
        """Describe rows of so many positions each (`slots`), cut over the context parallel ranks."""
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
        """int64 [positions]: where each position lies in the concatenation of all context parallel ranks' parts.

        Indexing with it brings tensors that were gathered from the context parallel ranks into the order of the rows.
        """
        order = np.concatenate([context_slice(self.slots, self.context_size, rank) for rank in range(self.context_size)])
        return torch.from_numpy(np.argsort(order)).to(self.cu_seqlens_q.device)

    @cached_property
    def masks(self) -> list[Tensor]:
        """For each row, bool [slot / context_size, slot]: which of its positions each local query attends to.

        They are read under context parallelism only, where a rank's queries are two pieces of the row, so that the causal
        mask is no triangle.
        """
        local = torch.from_numpy(context_slice(self.slots, self.context_size, self.context_rank))
        parts = local.split([slot // self.context_size for slot in self.slots])
        starts = np.cumsum([0, *self.slots])
        device = self.cu_seqlens_q.device
        return [
            (part[:, None] - int(start) >= torch.arange(slot)).to(device)
            for part, start, slot in zip(parts, starts, self.slots, strict=False)
        ]


FILLER = Row("", 0, Source.DEMONSTRATION, (0, 0), 1, None, None, None, 0.0, None)
"""A row that keeps a rank busy when others have more micro-batches; its weight of 0 makes its gradient exactly zero."""


def pack_all(
    rows: Sequence[Row], plan: Sequence[Sequence[int]], device: torch.device, layout: MicroBatchLayout
) -> list[MicroBatch]:
    """Make the micro-batches of one data parallel rank.

    Args:
        plan: for each micro-batch the indices of its rows; none gives a micro-batch of one `FILLER`.

    Raises:
        DataError: a row's recorded routes do not fit the model.
    """
    chosen = [[rows[index] for index in indices] for indices in plan]
    total = 0
    if layout.equal:
        total = max(sum(places(_fed_lengths(part or [FILLER]), layout.row_multiple, 1)) for part in chosen)
    return [pack(part, device, layout, total) for part in chosen]


def _fed_lengths(rows: Sequence[Row]) -> list[int]:
    """Count the tokens of each row that the model is fed: all but the last, which is only predicted."""
    return [len(row.tokens) - 1 for row in rows]


_FLOATS = ("behaviour_logprobs", "advantages", "weights", "row_lengths")


def pack(rows: Sequence[Row], device: torch.device, layout: MicroBatchLayout, total: int = 0) -> MicroBatch:
    """Make one micro-batch, with padding to `total` positions where its rows have fewer; without a row, of one `FILLER`.

    Raises:
        DataError: a row's recorded routes do not fit the model.
    """
    rows = rows or [FILLER]
    lengths = _fed_lengths(rows)
    slots = places(lengths, layout.row_multiple, layout.batch_multiple, total)
    starts = np.cumsum([0, *slots])
    size = int(starts[-1])
    tokens, targets, positions = (np.zeros(size, dtype=np.int64) for _ in range(3))
    responses, measured = (np.zeros(size, dtype=bool) for _ in range(2))
    floats = {name: np.zeros(size, dtype=np.float32) for name in _FLOATS}
    # There may be more slots than rows: the last ones are padding alone.
    for row, length, start in zip(rows, lengths, starts, strict=False):
        end = start + length
        # The position before a token predicts it, so the response's positions begin one before its first token.
        response = slice(end - row.response_length, end)
        tokens[start:end], targets[start:end], positions[start:end] = row.tokens[:-1], row.tokens[1:], np.arange(length)
        responses[response] = True
        floats["weights"][response] = row.weight
        floats["advantages"][response] = row.token_advantages if row.token_advantages is not None else row.advantage or 0.0
        floats["row_lengths"][response] = row.response_length
        if row.behaviour_logprobs is not None:
            floats["behaviour_logprobs"][response] = row.behaviour_logprobs
            measured[response] = True
    # Slots of padding alone count as the last row's. It changes no sum, since their weights are zero.
    row_of = np.repeat(np.minimum(np.arange(len(slots)), len(rows) - 1), slots)
    local = context_slice(slots, layout.context_size, layout.context_rank)
    routes = _routes(rows, starts, local, layout, device)
    return MicroBatch(
        tokens=torch.from_numpy(tokens[local])[None].to(device),
        positions=torch.from_numpy(positions[local])[None].to(device),
        targets=torch.from_numpy(targets[local]).to(device),
        length=size,
        predicted=torch.from_numpy(responses[local].nonzero()[0]).to(device),
        packing=RowPacking.of(slots, layout.context_size, layout.context_rank, device, routes),
        rows=torch.from_numpy(row_of).to(device),
        roles=torch.from_numpy(np.array([int(row.role) for row in rows])[row_of]).to(device),
        measured=torch.from_numpy(measured).to(device),
        **{name: torch.from_numpy(values).to(device) for name, values in floats.items()},
    )


def _routes(
    rows: Sequence[Row], starts: np.ndarray, local: np.ndarray, layout: MicroBatchLayout, device: torch.device
) -> Tensor | None:
    """Read the rows' recorded experts, int64 [layers, local positions, top-k], -1 elsewhere; None where no row has any.

    Raises:
        DataError: routes of another length than the row's, or of experts that the model does not have.
    """
    layers, topk, experts = layout.routers
    if not layers or all(row.routes is None for row in rows):
        return None
    routes = np.full((int(starts[-1]), layers, topk), -1, dtype=np.int64)
    for row, start in zip(rows, starts, strict=False):
        if row.routes is None:
            continue
        recorded, fed = row.routes, len(row.tokens) - 1
        if recorded.size != fed * layers * topk or recorded.min() < 0 or recorded.max() >= experts:
            raise DataError(
                f"prompt {row.prompt_id}: {recorded.size} recorded routes of experts {recorded.min()} to {recorded.max()}; "
                f"this model needs {fed} tokens × {layers} layers × {topk} of experts 0 to {experts - 1}. "
                "Was the row sampled from another model?"
            )
        routes[start : start + fed] = recorded.reshape(fed, layers, topk)
    # Each layer reads its own part, so the layers come first and lie whole in memory.
    return torch.from_numpy(np.ascontiguousarray(routes[local].swapaxes(0, 1))).to(device)


def response_slices(rows: Sequence[Row], layout: MicroBatchLayout) -> list[slice]:
    """Return where in a micro-batch of these rows the predictions of each row's response tokens lie."""
    lengths = _fed_lengths(rows)
    slots = [length + -length % layout.row_multiple for length in lengths]
    ends = [end - slot + length for end, slot, length in zip(itertools.accumulate(slots), slots, lengths, strict=True)]
    return [slice(end - row.response_length, end) for row, end in zip(rows, ends, strict=True)]
