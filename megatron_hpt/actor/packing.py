"""Packed rows as Megatron's attention sees them, with what our own attention on the host needs to find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_hpt.data.packing import context_slice


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
