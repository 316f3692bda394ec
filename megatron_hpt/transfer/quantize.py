"""Weights on their way into FP8 engines: boxes of Hugging Face tensors become boxes of an FP8 checkpoint.

What an FP8 checkpoint holds, and what its loaders do with it (vLLM 0.32.0 and SGLang 0.5.23, the file
``layers/quantization/fp8.py`` of each, ``parameter.py`` and the two ``utils`` beside them):

* Block-wise: ``X.weight_scale_inv``, float32, one number for each 128×128 block, a last partial block included. The name
  says inverse, the loaders multiply by it. vLLM refuses an engine layout whose ranks, or whose parts of a fused projection
  (all but the last one on an unsplit engine), do not hold whole blocks. The scales are kept as they come, except where
  DeepGEMM wants powers of two: there both engines quantise again after loading (``requant_weight_ue8m0_inplace``).
* Per tensor: ``X.weight_scale``, float32. Both loaders take shape ``[]`` and ``[1]``, and keep a slot for every part of a
  fused projection (q, k, v; gate, up; w1, w3 of each expert). After loading, vLLM and SGLang's per-tensor kernels put all
  parts on the maximum of their scales: dequantise *through float16*, quantise again. SGLang's channel-wise kernels
  (CUTLASS, Marlin) instead repeat each part's scale over its rows. The second rounding changes nothing where the parts
  already share one scale and its amax is above about 0.01, where float16 still resolves the codes: give such parts the
  same `amax`.

The scale is amax / 448, the values are multiplied by the float32 reciprocal of the float32 scale, as ``per_block_cast_to_fp8``
of DeepGEMM (deep_gemm/utils/math.py) and vLLM (utils/deep_gemm.py), and ``blockwise_cast_to_fp8_triton`` of slime
(slime/backends/megatron_utils/kernels/fp8_kernel.py) do. They differ only in how small an amax may get: 1e-4 in the first
two, 1e-10 in slime. Here it is slime's, which keeps the precision of small blocks. A block of zeros gets scale 1, not a
tiny one; its codes are zero either way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_hpt.errors import TransferError
from megatron_hpt.models.mapping import ShardView

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite value of float8_e4m3fn."""
SMALLEST_AMAX = 1e-10
"""A smaller amax counts as this one: the reciprocal of a subnormal scale is infinite."""

Box = tuple[int, ...]

_ATTENTION = "model.layers.{}.self_attn."
_LAYER = "model.layers.{}."
RULES: dict[str, bool] = {
    "model.embed_tokens.weight": False,
    "model.norm.weight": False,
    "lm_head.weight": False,
    _LAYER + "input_layernorm.weight": False,
    _LAYER + "post_attention_layernorm.weight": False,
    **{f"{_ATTENTION}{x}_norm.weight": False for x in "qk"},
    **{f"{_ATTENTION}{x}_proj.weight": True for x in "qkvo"},
    **{f"{_LAYER}mlp.{x}_proj.weight": True for x in ("gate", "up", "down")},
    _LAYER + "mlp.gate.weight": False,
    **{f"{_LAYER}mlp.experts.{{}}.{x}_proj.weight": True for x in ("gate", "up", "down")},
    _LAYER + "block_sparse_moe.gate.weight": False,
    **{f"{_LAYER}block_sparse_moe.experts.{{}}.w{x}.weight": True for x in "123"},
}
"""HF name with ``{}`` for numbers → whether FP8 engines hold it quantised (Llama, Mixtral, Qwen3, Qwen3-MoE)."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def is_quantized(name: str) -> bool:
    """Whether FP8 engines hold this tensor quantised: the weights of linear layers, never embeddings, output, norms, routers.

    vLLM builds the router of Qwen3-MoE from its ``quantization_config`` too (models/qwen3_moe.py), so that must list the
    ``mlp.gate`` of every layer under ``modules_to_not_convert``; other routers and all of SGLang's stay as they are.

    Raises:
        TransferError: no rule names the tensor. A loader would cast a weight without its scale, and not complain.
    """
    pattern = _NUMBER.sub("{}", name)
    if pattern not in RULES:
        raise TransferError(f"{name}: no rule of {__name__}.RULES says whether FP8 engines hold it quantised; add one")
    return RULES[pattern]


class Fp8Format(Protocol):
    """How a checkpoint scales its FP8 weights."""

    @property
    def suffix(self) -> str:
        """Ending that makes the scale's name of the weight's."""
        ...

    @property
    def allowed(self) -> str:
        """The boxes that `aligned` accepts, in words for error messages."""
        ...

    def aligned(self, offset: Box, extent: Box, shape: Box) -> bool:
        """Whether the box's scales depend on nothing outside of it, so that it quantises to the box of the quantised whole."""
        ...

    def takes_amax(self, amax: Tensor) -> bool:
        """Whether `amax`, known beforehand, can stand for what the box itself holds."""
        ...

    def scale_shape(self, shape: Box) -> Box:
        """Return the shape of the scales of a weight of `shape`."""
        ...

    def scale_box(self, offset: Box, extent: Box) -> tuple[Box, Box] | None:
        """Return offset and extent of the scales that the weight's box brings, or None if another box brings them."""
        ...

    def amax(self, weight: Tensor) -> Tensor:
        """Return largest magnitudes, float32 of `scale_shape`; they are not finite where the weight is not."""
        ...

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return the weight in float32, times its factors (of `scale_shape`)."""
        ...


@dataclass(frozen=True)
class BlockWise:
    """One scale for each `size` × `size` block; at a ragged edge blocks are smaller."""

    size: int
    suffix: str = "_scale_inv"

    @property
    def allowed(self) -> str:
        return f"boxes that start at a multiple of {self.size} and end at one, or where the tensor ends, in both dimensions"

    def aligned(self, offset: Box, extent: Box, shape: Box) -> bool:
        """Whether the box holds whole blocks."""
        ends = (o + e for o, e in zip(offset, extent, strict=True))
        starts_whole = all(o % self.size == 0 for o in offset)
        return starts_whole and all(end % self.size == 0 or end == n for end, n in zip(ends, shape, strict=True))

    def takes_amax(self, amax: Tensor) -> bool:
        """Return False: a box of whole blocks needs no other's."""
        return False

    def scale_shape(self, shape: Box) -> Box:
        """Return ``[ceil(out / size), ceil(in / size)]``."""
        return tuple(math.ceil(n / self.size) for n in shape)

    def scale_box(self, offset: Box, extent: Box) -> tuple[Box, Box] | None:
        """Return the place of the scales of the box's blocks."""
        return tuple(o // self.size for o in offset), self.scale_shape(extent)

    def amax(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of each block, float32 ``[ceil(out / size), ceil(in / size)]``."""
        return self._blocks(weight).abs().amax(dim=(1, 3))

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return each block times its factor, float32 ``[out, in]``."""
        rows, columns = self.scale_shape(tuple(weight.shape))
        whole = (self._blocks(weight) * factor[:, None, :, None]).view(rows * self.size, columns * self.size)
        return whole[: weight.shape[0], : weight.shape[1]]

    def _blocks(self, weight: Tensor) -> Tensor:
        """View as ``[block row, row, block column, column]``, with edges filled with zeros, which change no magnitude."""
        rows, columns = self.scale_shape(tuple(weight.shape))
        missing = (0, columns * self.size - weight.shape[1], 0, rows * self.size - weight.shape[0])
        return pad(weight.float(), missing).view(rows, self.size, columns, self.size)


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor, of shape ``[1]``: both loaders take it, and a box of it can be placed."""

    suffix: str = "_scale"

    @property
    def allowed(self) -> str:
        return "the whole tensor, or any box of it together with the amax of the whole as one float32"

    def aligned(self, offset: Box, extent: Box, shape: Box) -> bool:
        """Whether the box is the whole tensor."""
        return extent == shape

    def takes_amax(self, amax: Tensor) -> bool:
        """Whether it is one float32."""
        return tuple(amax.shape) == (1,) and amax.dtype == torch.float32

    def scale_shape(self, shape: Box) -> Box:
        """Return ``[1]``."""
        return (1,)

    def scale_box(self, offset: Box, extent: Box) -> tuple[Box, Box] | None:
        """Have the box at the origin bring the one scale: in a transfer every number has one sender."""
        return None if any(offset) else ((0,), (1,))

    def amax(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude, float32 ``[1]``, which ranks reduce by maximum before they quantise their boxes."""
        return weight.abs().amax().float().view(1)

    def scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Return the weight times its factor, float32 ``[out, in]``."""
        return weight.float() * factor


BLOCK_128 = BlockWise(128)
"""DeepSeek's checkpoints: ``quant_method: fp8`` with ``weight_block_size: [128, 128]``."""
PER_TENSOR = PerTensor()
"""``quant_method: fp8`` without a block size; compressed-tensors with strategy ``tensor``."""


def check_cut(name: str, offset: Box, extent: Box, shape: Box, fp8: Fp8Format) -> None:
    """Refuse a box that its sender cannot quantise without what lies outside of it.

    Args:
        name: HF name, for the message.
        offset: where the box starts in each dimension.
        extent: its size in each dimension.
        shape: shape of the whole tensor.

    Raises:
        TransferError: the tensor is no matrix, the box is empty or not inside of it, or the cut is not aligned.
    """
    inside = len(shape) == 2 and all(o >= 0 and e > 0 and o + e <= n for o, e, n in zip(offset, extent, shape, strict=True))
    if not inside or not fp8.aligned(offset, extent, shape):
        raise TransferError(
            f"{name} {list(shape)}: the box at {list(offset)} + {list(extent)} cannot be quantised to FP8 with {fp8}; "
            f"allowed: {fp8.allowed}"
        )


def quantize(box: ShardView, fp8: Fp8Format, amax: Tensor | None = None) -> list[ShardView]:
    """Quantise a box of a weight into its box of an FP8 checkpoint, and the box of its scales where this box brings them.

    Weights are clamped to ±448 and rounded to nearest, ties to even.

    Args:
        box: float32 or bfloat16, two-dimensional, of any device.
        amax: largest magnitude of the *whole* tensor, float32 ``[1]``, already reduced over the ranks that hold it;
            `PER_TENSOR` only, which then takes any box. A larger one, common to a fused projection's parts, serves too.

    Returns:
        ``X.weight``, float8_e4m3fn, of the box's shape and place; then ``X.weight_scale_inv`` (`BLOCK_128`, float32, the
        box of its blocks) or ``X.weight_scale`` (`PER_TENSOR`, float32 ``[1]``, only from the box at offset 0).

    Raises:
        TransferError: a tensor that is not quantised or of another dtype, a cut that is not aligned (`check_cut`), an
            amax that the format does not take or that is smaller than what the box holds, or a weight that is not finite.
    """
    if not is_quantized(box.name):
        raise TransferError(f"{box.name} is not quantised in FP8 engines: it is neither embedding, norm, router nor output")
    weight = box.read()
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TransferError(f"{box.name}: {weight.dtype} cannot be quantised to FP8; allowed: float32, bfloat16")
    if amax is None:
        check_cut(box.name, box.offset, box.extent, box.shape, fp8)
    scale = _scale(_amax(box.name, weight, fp8, amax))
    # Clamped although no product exceeds 448 by more than a rounding: torch casts what is too large to NaN.
    codes = fp8.scaled(weight, scale.reciprocal()).clamp_(-FP8_MAX, FP8_MAX).to(FP8).contiguous()
    boxes = [ShardView(box.name, box.shape, box.offset, box.extent, codes)]
    if (place := fp8.scale_box(box.offset, box.extent)) is not None:
        boxes.append(ShardView(box.name + fp8.suffix, fp8.scale_shape(box.shape), *place, scale))
    return boxes


def _amax(name: str, weight: Tensor, fp8: Fp8Format, known: Tensor | None) -> Tensor:
    """Return what the scales are made of: the box's own magnitudes, or the known ones once they have been checked."""
    own = fp8.amax(weight)
    if not bool(torch.isfinite(own).all()):
        raise TransferError(f"{name}: the weight is not finite: {int((~torch.isfinite(weight)).sum())} values are inf or nan")
    if known is None:
        return own
    if not fp8.takes_amax(known):
        raise TransferError(
            f"{name}: {fp8} takes no amax of shape {list(known.shape)} and {known.dtype}; allowed: {fp8.allowed}"
        )
    known = known.to(own.device)
    if not bool(torch.isfinite(known).all()) or bool((own > known).any()):
        raise TransferError(
            f"{name}: the given amax {known.tolist()} is not that of the whole tensor: this box reaches {own.tolist()}"
        )
    return known


def _scale(amax: Tensor) -> Tensor:
    """Return the scales, float32, of the shape of `amax`."""
    # Divided by a tensor: CUDA multiplies by the reciprocal where the divisor is a number, and rounds differently.
    scale = amax.clamp(min=SMALLEST_AMAX) / torch.full_like(amax, FP8_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantized_shapes(
    expected: Mapping[str, tuple[int, ...]], fp8: Fp8Format, source: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return what an engine in this format receives.

    Args:
        expected: HF name → shape of the complete model (`mapping.hf_tensor_shapes`).
        source: dtype name of the trainer's weights, which the tensors that are not quantised keep, e.g. ``bfloat16``.

    Returns:
        HF name → shape and dtype name, scales included.

    Raises:
        TransferError: no rule names a tensor.
    """
    received: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in expected.items():
        if is_quantized(name):
            received[name] = (tuple(shape), "float8_e4m3fn")
            received[name + fp8.suffix] = (fp8.scale_shape(tuple(shape)), "float32")
        else:
            received[name] = (tuple(shape), source)
    return received
