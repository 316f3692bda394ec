"""The distributed optimizer's state as parts of whole parameters, which any other layout can load.

Every data parallel rank owns a range of each flattened parameter: main weights and moments. A range of a flat tensor is
a few boxes of the tensor itself (`boxes`), and boxes are what a distributed checkpoint is made of. So every rank writes
and reads exactly what it owns, in place, without talking to another rank. megatron-core 0.16.1's own
``fully_reshardable`` state gathers all ranges on one rank first, which on the host takes three times as long as writing;
its ``dp_reshardable`` state fits one tensor and pipeline parallel layout only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]
_MAIN = "param"
_STEP = "step"


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """A range of a flattened tensor as boxes of the tensor, in the order of memory; at most 2·dimensions − 1.

    Args:
        shape: of the tensor, row-major.
        start: first element of the range.
        end: one past its last element.

    Returns:
        Offsets and sizes of each box; every box is contiguous in memory.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if first > last:  # within one row
        return _in_row(shape, last, start, end)
    found = _in_row(shape, first - 1, start, first * row)
    if last > first:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> list[Box]:
    before = row * math.prod(shape[1:])
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start - before, end - before)]


def sharded(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The state of this rank for a distributed checkpoint; its tensors are views, so loading fills the optimizer.

    Args:
        optimizer: with its moments allocated.
        model: the chunks' `sharded_state_dict`, which says where a parameter lies in the whole model.

    Returns:
        ``step``, the Adam steps taken, and ``parts``, one `ShardedTensor` for each box. Learning rate and weight decay
        are absent: the recipe gives them anew.
    """
    found, _ = extract_sharded_tensors_and_factories(model)
    where = {base.data: base for base in nested_values(found)}
    parts = [
        box
        for part in optimizer.chained_optimizers
        for parameter in part.model_param_gbuf_map
        for box in _of_parameter(part, parameter, where[parameter])
    ]
    return {_STEP: _steps(optimizer), "parts": parts}


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Continue the count of Adam's bias correction."""
    for group in optimizer.param_groups:
        group[_STEP] = step


def _steps(optimizer: MegatronOptimizer) -> int:
    """A group without parameters on this rank does not count."""
    return max(int(group.get(_STEP) or 0) for group in optimizer.param_groups)


def _of_parameter(part: DistributedOptimizer, parameter: torch.nn.Parameter, whole: ShardedBase) -> Iterator[ShardedTensor]:
    """The boxes of main weights and moments of the range of a parameter that this rank owns."""
    owned, pieces = part._get_model_param_range_map(parameter)["param"], _pieces(whole, parameter.shape)
    for name, values in part._get_main_param_and_optimizer_states(parameter).items():
        if name == _STEP or (name == _MAIN and values.data_ptr() == _address(parameter, owned.start)):
            continue  # a float32 parameter is its own main weight, and is saved as the model's
        for piece, begin in pieces:
            start, end = max(owned.start, begin), min(owned.end, begin + math.prod(piece.local_shape))
            for offset, size in boxes(piece.local_shape, start - begin, end - begin):
                data = values[start - owned.start :][: math.prod(size)].view((1,) * piece.prepend_axis_num + size)
                start += math.prod(size)
                yield _box(f"optimizer.{name}.{piece.key}", piece, offset, data)


def _address(parameter: torch.Tensor, element: int) -> int:
    return parameter.data_ptr() + element * parameter.element_size()


def _pieces(whole: ShardedBase, shape: torch.Size) -> list[tuple[ShardedTensor, int]]:
    """The tensors of the checkpoint that a parameter is written as, and where each begins in the flat parameter.

    Usually one. A gated MLP's first layer is two, gate and up. The factory that cuts it is given a tensor without data,
    so that this works for any storage of the parameter, FP8 included.
    """
    if isinstance(whole, ShardedTensorFactory):
        whole = replace(whole, data=torch.empty(shape, device="meta"))
        cut = [whole.build()]
        apply_factories(cut)
        pieces = [(piece, piece.data.storage_offset()) for piece in nested_values(cut)]
        if not all(piece.data.is_contiguous() for piece, _ in pieces):
            raise NotImplementedError(f"{whole.key}: Megatron writes it as tensors that are not contiguous in the parameter")
        return pieces
    return [(whole, 0)]


def _box(key: str, piece: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor) -> ShardedTensor:
    inside = (0,) * piece.prepend_axis_num + offset
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=tuple(data.shape),
        global_shape=piece.global_shape,
        global_offset=tuple(a + b for a, b in zip(piece.global_offset, inside, strict=True)),
        axis_fragmentations=None,  # boxes are of any size
        # The last coordinate counts copies over data parallel ranks, and a range has one owner.
        replica_id=(*piece.replica_id[:2], 0),
        allow_shape_mismatch=piece.allow_shape_mismatch,
    )
