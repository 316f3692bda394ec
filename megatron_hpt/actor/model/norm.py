"""RMSNorm for layer specs without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root mean square norm (arXiv 1910.07467) that works under sequence parallelism too, which Megatron's own refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron adds up the gradients of parameters that are so marked over the tensor parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension of `hidden`."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
