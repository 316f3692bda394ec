"""The rotary frequencies of a model.

Megatron's own Llama 3 scaling has fixed numbers but for the factor (models/common/embeddings/rotary_pos_embedding.py), so
scaled frequencies are computed here, in float32 as transformers does, and put in place of Megatron's.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_hpt.models.hf_config import LinearScaling, Llama3Scaling, ModelShape


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Compute the frequencies, float32 [head_dim / 2], in radians a position.

    Source: transformers, modeling_rope_utils.py (`_compute_default`, `_compute_linear_scaling`, `_compute_llama3`).
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    return frequencies if shape.rope_scaling is None else _SCALED[type(shape.rope_scaling)](frequencies, shape.rope_scaling)


def _linear(frequencies: Tensor, scaling: LinearScaling) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies  # in positions
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    # Short waves keep their frequency, long ones are divided by the factor, and those between are a mean of both.
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


_SCALED = {LinearScaling: _linear, Llama3Scaling: _llama3}


def place(model: GPTModel, shape: ModelShape) -> None:
    """Give a model that has just been built its frequencies; once it has run, it keeps the angles that it has computed."""
    if shape.rope_scaling is not None:
        embedding = model.rotary_pos_emb
        embedding.inv_freq = inverse_frequencies(shape).to(embedding.inv_freq.device)
