"""Names, shapes and dtypes of what is sent to engines: the model's tensors, or those of its FP8 checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megatron_hpt.errors import ModelError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import ShardView, hf_tensor_shapes
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.manifest import dtype_of
from megatron_hpt.transfer.quantize import (
    BLOCK_128,
    PER_TENSOR,
    BlockWise,
    Fp8Format,
    check_cut,
    is_quantized,
    quantize,
    quantized_shapes,
)


def fp8_format(config: dict[str, Any]) -> Fp8Format | None:
    """Return the FP8 format that an engine's config.json asks for, or None where weights travel as they are trained.

    Raises:
        ModelError: it asks for a quantisation that nothing here converts to.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    if quantization.get("quant_method") == "fp8" and quantization.get("weight_block_size") in (None, [128, 128]):
        return BLOCK_128 if quantization.get("weight_block_size") else PER_TENSOR
    raise ModelError(
        f"quantization_config = {quantization!r}: weights are converted to quant_method fp8, per tensor or with "
        "weight_block_size [128, 128]"
    )


@dataclass(frozen=True)
class Wire:
    """Names, shapes and dtypes on the way, and the boxes that a rank's views become. Sender and receiver make it alike."""

    shape: ModelShape
    dtype: str
    """Of the trainer's weights."""
    fp8: Fp8Format | None = None

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor of a version, scales included."""
        plain = hf_tensor_shapes(self.shape)
        if self.fp8 is None:
            return plain
        return {name: shape for name, (shape, _) in quantized_shapes(plain, self.fp8, self.dtype).items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return getattr(torch, dtype_of(name, self.tensors, self.dtype))

    @cached_property
    def item_bytes(self) -> dict[str, int]:
        """Bytes of an element of each tensor."""
        return {name: self.dtype_of(name).itemsize for name in self.tensors}

    @cached_property
    def row_multiple(self) -> dict[str, int]:
        """Tensor → rows of a block, at whose multiples alone its boxes may be cut; only tensors that have blocks."""
        if not isinstance(self.fp8, BlockWise):
            return {}
        return {name: self.fp8.size for name in self.tensors if name + self.fp8.suffix in self.tensors}

    def check_cuts(self, held: Mapping[str, Iterable[Box]]) -> None:
        """Refuse a layout whose ranks hold parts of blocks, of which nobody could make a scale.

        Args:
            held: name → boxes that ranks hold.

        Raises:
            TransferError: names the first such box.
        """
        for name in self.row_multiple:
            for box in held[name]:
                check_cut(name, box.offset, box.extent, self.tensors[name], self.fp8)

    def boxes_of(self, view: ShardView) -> list[tuple[str, Box]]:
        """Return the boxes on the way that a held box of the model can bring: its own, and that of its scales."""
        boxes = [(view.name, Box(view.offset, view.extent))]
        if self.fp8 is not None and is_quantized(view.name):
            place = self.fp8.scale_box(view.offset, view.extent)
            boxes += [(view.name + self.fp8.suffix, Box(*place))] if place else []
        return boxes

    def plain_name(self, name: str) -> str:
        """Return the name of the model's tensor behind a tensor on the way."""
        return name.removesuffix(self.fp8.suffix) if self.fp8 is not None else name

    def converted(self, view: ShardView, amax: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return a box of the model as it travels, by name; quantised where the format asks for it.

        Args:
            amax: of the whole tensor, float32 ``[1]``, for `PER_TENSOR`.
        """
        if self.fp8 is None or not is_quantized(view.name):
            return {view.name: view.view}
        known = amax if self.fp8 == PER_TENSOR else None
        return {part.name: part.view for part in quantize(view, self.fp8, known)}
