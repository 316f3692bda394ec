"""Core attention on torch's scaled_dot_product_attention, for layer specs without Transformer Engine.

Megatron's own unfused attention builds whole score matrices, and refuses packed rows and context parallelism. This one
makes one fused call for each packed row (``thd``), so it computes no score between rows. Under context parallelism every
rank gathers the keys and values of the whole rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from megatron_hpt.actor.microbatch import RowPacking


class PackedAttention(MegatronModule):
    """Causal attention over packed rows, with grouped queries; Megatron builds one for each layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        heads = divide(config.num_attention_heads, config.tensor_model_parallel_size)
        self.repeat = divide(heads, divide(config.num_query_groups, config.tensor_model_parallel_size))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowPacking | None = None,
    ) -> Tensor:
        """Attend within each row.

        Args:
            query: [local tokens, heads, head_dim]; key and value: [local tokens, kv_heads, head_dim].
            packed_seq_params: positions of each row, which add up to the local tokens times the context parallel ranks.

        Returns:
            [local tokens, heads · head_dim].

        Raises:
            ValueError: the rows are not described by a `RowPacking`.
        """
        packing = packed_seq_params
        if not isinstance(packing, RowPacking):
            raise ValueError("PackedAttention attends over packed rows only: packed_seq_params must be a RowPacking")
        if packing.context_size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (_Gather.apply(x, group)[packing.unsliced] for x in (key, value))
        queries = query.split([slot // packing.context_size for slot in packing.slots])
        masks = packing.masks if packing.context_size > 1 else [None] * len(packing.slots)
        rows = zip(queries, key.split(packing.slots), value.split(packing.slots), masks, strict=True)
        return torch.cat([self._row(*row) for row in rows]).flatten(1)

    def _row(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within one row. Its padding comes after it, where causal attention never looks."""
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        if self.repeat > 1:
            k, v = (x.repeat_interleave(self.repeat, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return out[0].transpose(0, 1)


class _Gather(torch.autograd.Function):
    """Gathers all ranks' parts along the first dimension; the gradient of a part is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty((group.size() * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty((grad.shape[0] // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(part, grad.contiguous(), group=ctx.group)
        return part, None
