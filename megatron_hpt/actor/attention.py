"""Core attention on torch's scaled_dot_product_attention, for layer specs without Transformer Engine.

Megatron's own unfused attention builds whole score matrices and refuses packed rows. This one takes packed rows
(``thd``): they are laid side by side only here, for one fused causal call, so every other layer computes no padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor


class PackedAttention(MegatronModule):
    """Causal attention over packed rows, with grouped queries."""

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
        if config.context_parallel_size > 1:
            raise ValueError("PackedAttention does not support context parallelism")
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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each row.

        Args:
            query: [tokens, heads, head_dim]; key and value: [tokens, kv_heads, head_dim].
            packed_seq_params: cumulative row lengths; they add up to `tokens`.

        Returns:
            [tokens, heads · head_dim].
        """
        if packed_seq_params is None:
            raise ValueError("PackedAttention attends over packed rows only: packed_seq_params is missing")
        index, places = _side_by_side(packed_seq_params, query.device)
        rows = [x[index].transpose(1, 2) for x in (query, key, value)]  # [rows, heads, longest, head_dim]
        if self.repeat > 1:
            rows[1:] = [x.repeat_interleave(self.repeat, dim=1) for x in rows[1:]]
        # A row's padding comes after it, where causal attention never looks.
        out = F.scaled_dot_product_attention(*rows, is_causal=True, scale=self.scale)
        return out.transpose(1, 2).flatten(0, 1)[places].flatten(1)


def _side_by_side(params: PackedSeqParams, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices between packed tokens and padded rows.

    Returns:
        index: [rows, longest], the token at each place (padding repeats the row's last token);
        places: [tokens], where each token lies in the flattened rows.
    """
    ends = params.cu_seqlens_q[1:].to(device=device, dtype=torch.long)
    starts = params.cu_seqlens_q[:-1].to(device=device, dtype=torch.long)
    longest = int(params.max_seqlen_q)
    columns = torch.arange(longest, device=device)
    index = starts[:, None] + columns
    places = (index < ends[:, None]).flatten().nonzero().squeeze(1)
    return torch.minimum(index, ends[:, None] - 1), places
