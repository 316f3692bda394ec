"""Checkpoints in Megatron's distributed format: any layout can load what another layout saved.

A checkpoint is a folder ``step_000020`` that appears by one rename after every rank has written its part, so a folder
of that name is whole. ``step`` is the number of optimizer steps it contains, which is also the version of its weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_hpt.actor.platform import Platform
from megatron_hpt.errors import CheckpointError
from megatron_hpt.run import RunDir

# The one sharding of optimizer state that loads into any layout and works with packed parameter buffers.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def save(
    run: RunDir,
    step: int,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    platform: Platform,
    keep: int,
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of a step into a run and remove all but the newest `keep`; collective over all ranks."""
    save_to(run.checkpoint(step), step, chunks, optimizer, platform, state)
    if dist.get_rank() == 0:
        for old in run.checkpoint_steps()[:-keep]:
            shutil.rmtree(run.checkpoint(old))
    dist.barrier()


def save_to(
    final: Path,
    step: int,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    platform: Platform,
    state: dict[str, Any] | None = None,
) -> None:
    """Write one checkpoint, whole; without an optimizer the weights alone (a converted model).

    Args:
        state: small values that training depends on besides weights and optimizer; JSON.
    """
    temporary = final.with_name(f".{final.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    with platform.building():
        dist_checkpointing.save(_state(chunks, optimizer, loading=False), str(temporary))
    _end_helper_process()
    dist.barrier()
    if dist.get_rank() == 0:
        meta = {**(state or {}), "step": step, "optimizer": optimizer is not None}
        (temporary / "megatron_hpt.json").write_text(json.dumps(meta))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    dist.barrier()


def _end_helper_process() -> None:
    """Megatron's writer keeps a manager process for its next save; it would outlive a rank that is killed."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        filesystem_async._results_queue._manager.shutdown()
        filesystem_async._results_queue = None


def load(path: Path, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, platform: Platform) -> dict[str, Any]:
    """Load a checkpoint into this layout; collective over all ranks.

    Returns:
        ``step``, the optimizer steps that it contains, and the small values that were saved with it.

    Raises:
        CheckpointError: not a checkpoint of this project, or saved without the optimizer that is to be loaded.
    """
    try:
        meta = json.loads((path / "megatron_hpt.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project: {error}") from None
    if optimizer is not None and not meta["optimizer"]:
        raise CheckpointError(f"{path}: holds weights without optimizer state; it can be exported, not resumed")
    with platform.building(), torch.no_grad():
        state = dist_checkpointing.load(_state(chunks, optimizer, loading=True), str(path))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(state[_key(chunks, index)])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
    return meta


def _state(chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {_key(chunks, i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=loading, metadata=_SHARDING)
    return state


def _key(chunks: Sequence[GPTModel], index: int) -> str:
    """Megatron's optimizer finds the chunks' parts of a state under these names."""
    return f"model{index}" if len(chunks) > 1 else "model"
