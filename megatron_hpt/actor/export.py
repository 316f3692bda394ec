"""Write the actor's weights as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_hpt.files import swap_in, whole_folder
from megatron_hpt.models.hf_files import copy_side_files, dtype_change, write_config
from megatron_hpt.models.mapping import ShardView


@dataclass(frozen=True)
class _Box:
    """A shard view without its tensor, as ranks describe to each other what they will send."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: torch.dtype


def export_hf(source: str | Path, target: Path, views: Sequence[ShardView]) -> None:
    """Write ``target`` as a copy of the folder ``source`` with this model's weights; collective over all ranks.

    Configuration, tokenizer and other side files are carried over unchanged; the folder appears whole or not at all.

    Args:
        views: the boxes that this rank contributes (`policy.contributed_views`).
    """
    tensors = _gather(views)
    if dist.get_rank() == 0:
        new = target.with_name(f".{target.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with whole_folder(new) as temporary:
            copy_side_files(Path(source), temporary)
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            write_config(temporary, dtype_change(temporary, dtype))
        swap_in(new, target)  # there may be an export of the run before it was resumed
    dist.barrier()


@torch.no_grad()
def _gather(views: Sequence[ShardView]) -> dict[str, Tensor]:
    """Collect all tensors in rank 0's host memory, one box at a time; other ranks get an empty dict."""
    mine = [_Box(v.name, v.shape, v.offset, v.extent, v.view.dtype) for v in views]
    boxes_of_ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(boxes_of_ranks, mine)
    if dist.get_rank() != 0:
        for view in views:
            dist.send(view.read().contiguous().cpu(), dst=0)
        return {}
    tensors: dict[str, Tensor] = {}
    # In the order in which each rank sends, so that messages need no names.
    for rank, boxes in enumerate(boxes_of_ranks):
        for index, box in enumerate(boxes):
            if rank == 0:
                part = views[index].read().cpu()
            else:
                part = torch.empty(box.extent, dtype=box.dtype)
                dist.recv(part, src=rank)
            whole = tensors.setdefault(box.name, torch.empty(box.shape, dtype=box.dtype))
            whole[tuple(slice(o, o + e) for o, e in zip(box.offset, box.extent, strict=True))] = part
    return tensors
