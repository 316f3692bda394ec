"""Weights that Transformer Engine keeps in FP8 (`actor.fp8_param_gather`), and how values come into them.

Such a tensor has scales that depend on all of its values, so it is written whole: slices written one after the other would
share a scale that fits none of them. And Megatron's optimizer makes its float32 main weights of the values that Transformer
Engine kept when it built the layer (`get_high_precision_init_val`), which were random.
"""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor


def writable(parameter: Tensor) -> Tensor:
    """Return a tensor of zeros of the parameter's shape in which parts of it can be written: the parameter itself unless it is
    in FP8. `fill` has to be called afterwards."""
    if is_float8tensor(parameter):
        return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    return parameter.detach().zero_()


def fill(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter in FP8 its values, and the optimizer that is made later its main weights; does nothing to others.

    Args:
        values: what `writable` returned, or a tensor of the parameter's shape.
    """
    if is_float8tensor(parameter):
        parameter.copy_(values)
        keep_initial(parameter, values)


def keep_initial(parameter: Tensor, values: Tensor) -> None:
    """Have the optimizer that is made later begin from the values of a parameter in FP8, which it has been given already."""
    if hasattr(parameter, "_high_precision_init_val"):  # the optimizer has not been made yet
        parameter._high_precision_init_val = values.detach().cpu()
