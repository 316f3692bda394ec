"""Checkpoints in Megatron's distributed format: any layout can load what another layout saved.

A checkpoint is a folder ``step_000020`` that appears by one rename after every rank has written its part, so a folder
of that name is whole. ``step`` is the number of optimizer steps it contains, which is also the version of its weights.
A run writes them in the background: a forked process of every rank writes the memory as it was at the fork (on CUDA: a
copy on the host), and training goes on. Every rank writes what it owns (`optimizer_state`).
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_hpt.actor.optimizer import state as optimizer_state
from megatron_hpt.actor.platform import Platform
from megatron_hpt.errors import CheckpointError
from megatron_hpt.files import swap_in
from megatron_hpt.models import checkpoint_sums
from megatron_hpt.models.checkpoints import SIDE_FILES, checksums, mark_damaged, read_meta, record
from megatron_hpt.models.hf_files import copy_side_files
from megatron_hpt.process import die_with_parent

logger = logging.getLogger(__name__)


class Saver:
    """Writes checkpoints in the background, one at a time; all methods are collective over all ranks."""

    def __init__(self, platform: Platform, model: str | Path) -> None:
        """Nothing is written yet.

        Args:
            model: folder whose configuration and tokenizer go into every checkpoint, so that it can be exported by itself.
        """
        self._platform, self._model = platform, Path(model)
        self._queue = AsyncCallsQueue()

    def save(
        self,
        final: Path,
        step: int,
        chunks: Sequence[GPTModel],
        optimizer: MegatronOptimizer | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint; it appears in a later `finish`. One that is still being written is finished first.

        Args:
            optimizer: None writes the weights alone (a converted model).
            state: small values that training depends on besides weights and optimizer; JSON.
        """
        self.finish()
        temporary = _new_folder(final)
        start_results_process()
        with self._platform.building():
            state_dict = _without_copies(_state(chunks, optimizer))
            request = dist_checkpointing.save(state_dict, str(temporary), async_sharded_save=True)
        torch.save(_rng_state(), temporary / f"rng_{dist.get_rank()}.pt")
        meta = {**(state or {}), "step": step, "optimizer": optimizer is not None}
        request.finalize_fns.append(functools.partial(_appear, temporary, final, self._model, meta))
        if request.async_fn is not None:
            noted = functools.partial(_in_writer, request.async_fn, temporary, dist.get_rank())
            request = request._replace(async_fn=noted)
        self._queue.schedule_async_request(request)

    def finish(self, wait: bool = True) -> None:
        """Let what has been written by all ranks appear.

        Args:
            wait: for what is still being written.
        """
        self._queue.maybe_finalize_async_calls(blocking=wait)


def save_now(
    final: Path,
    step: int,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer | None,
    platform: Platform,
    model: str | Path,
    state: dict[str, Any] | None = None,
) -> None:
    """Write one checkpoint and wait for it (arguments as of `Saver`); collective over all ranks."""
    saver = Saver(platform, model)
    saver.save(final, step, chunks, optimizer, state)
    saver.finish()


def load(path: Path, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, platform: Platform) -> dict[str, Any]:
    """Load a checkpoint into this layout; collective over all ranks.

    Returns:
        ``step``, the optimizer steps that it contains, and the small values that were saved with it.

    Raises:
        CheckpointError: not a checkpoint of this project, damaged, or saved without the optimizer that is to be loaded.
    """
    meta = read_meta(path)
    _check_bytes(path, resumes=optimizer is not None)
    if optimizer is not None and not meta["optimizer"]:
        raise CheckpointError(f"{path}: holds weights without optimizer state; it can be exported, not resumed")
    with platform.building(), torch.no_grad():
        state = dist_checkpointing.load(_without_missing_extras(_state(chunks, optimizer), path), str(path))
        for index, chunk in enumerate(chunks):
            _fill(chunk, state[_key(chunks, index)])
        if optimizer is not None:
            optimizer_state.set_step(optimizer, state["optimizer"]["step"])
            _restore_rng(path)
    return meta


def _check_bytes(path: Path, resumes: bool) -> None:
    """The files are what was written, every byte; each rank looks at its share of them.

    Args:
        resumes: a damaged checkpoint is marked, so that the run's next start passes over it.

    Raises:
        CheckpointError: one is not; on all ranks alike.
    """
    written, rank, ranks = checksums(path), dist.get_rank(), dist.get_world_size()
    if written is None:
        logger.warning("note: %s was written without checksums: changed bytes in it would not be noticed", path)
        return
    own = checkpoint_sums.differing(path, dict(list(written.items())[rank::ranks]))
    found: list[str | None] = [None] * ranks
    dist.all_gather_object(found, own)
    if (reason := next(filter(None, found), None)) is not None:
        if resumes and rank == 0:
            mark_damaged(path, reason)
        then = "; --resume goes on from the checkpoint before" if resumes else ""
        raise CheckpointError(f"{path}: {reason}{then}")


def _without_missing_extras(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state to load without the layers' extra state that the checkpoint lacks.

    Transformer Engine's layers keep FP8 scales there; other layers have fewer of them, and a converted checkpoint none.
    """
    there = load_sharded_metadata(str(path))

    def is_missing(part: Any) -> bool:
        return isinstance(part, ShardedObject) and part.key.endswith(_EXTRA) and part.unique_key not in there

    return extract_matching_values(state, is_missing)[1]


def _fill(chunk: GPTModel, state: dict[str, Any]) -> None:
    """Load a chunk's weights, all of them."""
    result = chunk.load_state_dict(state, strict=False)
    wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if not key.endswith(_EXTRA)]
    if wrong:
        raise CheckpointError(f"the checkpoint and the model do not have the same weights: {', '.join(wrong[:3])}")


_EXTRA = "_extra_state"


def _new_folder(final: Path) -> Path:
    """A folder beside `final` that no writer of a killed run still writes into; the same on every rank."""
    name = [f".{final.name}.{os.getpid()}.partial" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name, src=0)
    temporary = final.with_name(name[0])
    if dist.get_rank() == 0:
        for old in final.parent.glob(".step_*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    return temporary


def _appear(temporary: Path, final: Path, model: Path, meta: dict[str, Any]) -> None:
    """Rename a checkpoint that every rank has written into place."""
    if dist.get_rank() == 0:
        copy_side_files(model, temporary / SIDE_FILES)
        record(temporary, meta)
        swap_in(temporary, final)
    dist.barrier()


def _in_writer(write: Callable[..., None], folder: Path, rank: int, *arguments: Any, **named: Any) -> None:
    """In the forked process: die with the rank, whose signal handlers and thread pool are not this process's.

    The checksums of the rank's files are made here too, beside training and all ranks at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)  # it forks one process a file, and they would wait for it for ever
    torch.set_num_threads(1)  # a forked OpenMP pool has no threads, and waits for them for ever
    write(*arguments, **named)
    checkpoint_sums.note(
        folder, rank, sorted(path.name for path in folder.glob(f"__{rank}_*"))
    )  # as Megatron calls a rank's files


def start_results_process() -> None:
    """Start the manager process that Megatron's writers keep for their results; once is enough, and early is best.

    Megatron would spawn it at the first save, where it imports everything again, for seconds, and would let it outlive a killed
    rank. Forked before the model is there it costs nothing, and keeps no copy of the model's memory.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(initializer=die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _restore_rng(path: Path) -> None:
    """Of this rank, where as many ranks wrote the checkpoint; in another layout the generators start from the seed."""
    if len(list(path.glob("rng_*.pt"))) != dist.get_world_size():
        logger.warning("%s was written by another number of ranks: random generators start from trainer.seed", path)
        return
    state = torch.load(path / f"rng_{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _state(chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """What is written, and what loading fills in place."""
    state: dict[str, Any] = {_key(chunks, i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, state)
    return state


def _without_copies(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the host with a storage of their own over the same memory.

    Megatron's writer copies tensors that are a part of a larger storage, as all of a gradient or parameter buffer are.
    The forked writer has the memory as it was at the fork anyway.
    """
    apply_factories(state)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.data.device.type == "cpu":
            part.data = torch.from_dlpack(part.data.detach())
    return state


def _key(chunks: Sequence[GPTModel], index: int) -> str:
    """Megatron's optimizer finds the chunks' parts of a state under these names."""
    return f"model{index}" if len(chunks) > 1 else "model"
