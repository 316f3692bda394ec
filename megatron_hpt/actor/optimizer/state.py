"""The distributed optimizer's state as parts of whole parameters, which any other layout can load.

Every data parallel rank owns the main weights and moments of a range of each flattened parameter. A range of a flat
tensor is a few boxes of the tensor itself (`boxes`), and a distributed checkpoint is made of boxes. So every rank writes
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
"""Offset and size of a part of a tensor, in elements along each dimension."""
_MAIN = "param"
_STEP = "step"


def boxes(shape: Sequence[int], start: int, end: int) -> list[Box]:
    """Cut a range of a flattened tensor into boxes of the tensor, at most 2·dimensions − 1 of them.

    Args:
        shape: shape of the tensor, which is row-major.
        start: first element of the range.
        end: one past its last element.

    Returns:
        The boxes in the order of memory; every box is contiguous.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [((start,), (end - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # rows first to last - 1 are wholly in the range
    if first > last:  # the range lies within one row
        return _in_row(shape, last, start, end)
    result = _in_row(shape, first - 1, start, first * row)
    if last > first:
        result.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return result + _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> list[Box]:
    """Cut a range that lies within one row of the first dimension."""
    before = row * math.prod(shape[1:])
    return [((row, *offset), (1, *size)) for offset, size in boxes(shape[1:], start - before, end - before)]


def sharded(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state on this rank for a distributed checkpoint; called to save and to load one.

    Its tensors are views of the optimizer's own, so loading fills the optimizer.

    Args:
        optimizer: its moments must be allocated.
        model: the chunks' `sharded_state_dict`, which says where a parameter lies in the whole model.

    Returns:
        ``step``, the Adam steps taken, and ``parts``, one `ShardedTensor` for each box. Learning rate and weight decay
        are absent, because the recipe gives them anew.
    """
    tensors, _ = extract_sharded_tensors_and_factories(model)
    in_model = {sharded.data: sharded for sharded in nested_values(tensors)}
    parts = [
        box
        for part in optimizer.chained_optimizers
        for parameter in part.model_param_gbuf_map
        for box in _of_parameter(part, parameter, in_model[parameter])
    ]
    return {_STEP: _steps(optimizer), "parts": parts}


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of Adam steps taken, which its bias correction counts on; called after loading."""
    for group in optimizer.param_groups:
        group[_STEP] = step


def _steps(optimizer: MegatronOptimizer) -> int:
    """Return the number of Adam steps taken; a parameter group with none on this rank has not counted them."""
    return max(int(group.get(_STEP) or 0) for group in optimizer.param_groups)


def _of_parameter(part: DistributedOptimizer, parameter: torch.nn.Parameter, whole: ShardedBase) -> Iterator[ShardedTensor]:
    """Yield the boxes of main weights and moments of the range of a parameter that this rank owns.

    Args:
        whole: how the parameter itself is written to the checkpoint.
    """
    owned, pieces = part._get_model_param_range_map(parameter)["param"], _pieces(whole, parameter.shape)
    for name, values in part._get_main_param_and_optimizer_states(parameter).items():
        if name == _STEP or (name == _MAIN and values.data_ptr() == _address(parameter, owned.start)):
            continue  # a float32 parameter is its own main weight, and is saved as the model's
        for piece, begin in pieces:
            # What the owned range and the piece have in common, in elements of the flat parameter.
            start, end = max(owned.start, begin), min(owned.end, begin + math.prod(piece.local_shape))
            for offset, size in boxes(piece.local_shape, start - begin, end - begin):
                # Boxes come in the order of memory, so each begins in the range where the one before has ended.
                data = values[start - owned.start :][: math.prod(size)].view((1,) * piece.prepend_axis_num + size)
                start += math.prod(size)
                yield _box(f"optimizer.{name}.{piece.key}", piece, offset, data)


def _address(parameter: torch.Tensor, element: int) -> int:
    """Return where in memory an element of the flat parameter lies."""
    return parameter.data_ptr() + element * parameter.element_size()


def _pieces(whole: ShardedBase, shape: torch.Size) -> list[tuple[ShardedTensor, int]]:
    """Return the tensors that a parameter is written as, and the element of the flat parameter at which each begins.

    It is usually one; a gated MLP's first layer is two, gate and up, which Megatron's factory cuts.

    Args:
        whole: how the parameter is written to the checkpoint.
        shape: its shape on this rank.

    Raises:
        NotImplementedError: Megatron cuts the parameter into tensors that are not contiguous in it.
    """
    if not isinstance(whole, ShardedTensorFactory):
        return [(whole, 0)]
    # The factory says only how it cuts, not where. So it cuts a stand-in that has the parameter's shape and no data, whatever
    # the parameter is stored as (FP8 too): its parts are views, whose offsets in its storage are those in the flat parameter.
    whole = replace(whole, data=torch.empty(shape, device="meta"))
    built = [whole.build()]
    apply_factories(built)  # what a factory builds may hold factories again
    pieces = [(piece, piece.data.storage_offset()) for piece in nested_values(built)]
    if not all(piece.data.is_contiguous() for piece, _ in pieces):
        raise NotImplementedError(f"{whole.key}: Megatron writes it as tensors that are not contiguous in the parameter")
    return pieces


def _box(key: str, piece: ShardedTensor, offset: tuple[int, ...], data: torch.Tensor) -> ShardedTensor:
    """Describe a box of a piece to the checkpoint."""
    # Megatron stacks layers and experts along axes that a piece does not have itself; its offset begins with theirs.
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
