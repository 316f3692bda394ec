"""Checkpoints in Megatron's distributed format: any layout can load what another layout saved.

A checkpoint is a folder ``step_000020`` that appears by one rename after every rank has written its part, so a folder
of that name is whole. ``step`` is the number of optimizer steps it contains, which is also the version of its weights.
A run writes checkpoints in the background: every rank forks a process that writes the memory as it was at the fork (on
CUDA a copy on the host), while training goes on. Every rank writes what it owns (`optimizer.state`).
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

from megatron_hpt.actor.model import fp8_weights
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
    """Writes checkpoints in the background, one at a time; all methods are collective over all ranks.

    Args:
        model: folder whose configuration and tokenizer go into every checkpoint, so that it can be exported by itself.
    """

    def __init__(self, platform: Platform, model: str | Path) -> None:
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
            final: folder that appears.
            optimizer: its moments must be on the device; None writes the weights alone (a converted model).
            state: small JSON values that training depends on besides weights and optimizer; `load` returns them.
        """
        self.finish()
        temporary = _new_folder(final)
        start_results_process()
        with self._platform.building():
            state_dict = _without_copies(_state(chunks, optimizer))
            request = dist_checkpointing.save(state_dict, str(temporary), async_sharded_save=True)
        torch.save(_rng_state(), temporary / f"rng_{dist.get_rank()}.pt")
        meta = {**(state or {}), "step": step, "optimizer": optimizer is not None}
        request.finalize_fns.append(functools.partial(_put_in_place, temporary, final, self._model, meta))
        if request.async_fn is not None:  # Megatron's function that the fork runs; None on a rank that has nothing to write
            write = functools.partial(_write_in_fork, request.async_fn, temporary, dist.get_rank())
            request = request._replace(async_fn=write)
        self._queue.schedule_async_request(request)  # this forks

    def finish(self, wait: bool = True) -> None:
        """Let the checkpoint appear if all ranks have written it.

        Args:
            wait: wait for ranks that are still writing; without it such a checkpoint appears in a later call.
        """
        self._queue.maybe_finalize_async_calls(blocking=wait)


def load(path: Path, chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None, platform: Platform) -> dict[str, Any]:
    """Load a checkpoint into this layout, whatever layout saved it; collective over all ranks.

    Args:
        optimizer: its moments must be on the device; None loads the weights alone.

    Returns:
        ``step``, the optimizer steps that it contains, and the small values that were saved with it.

    Raises:
        CheckpointError: the folder is no checkpoint of this project, is damaged, or was saved without the optimizer that is
            to be loaded, or of a model with other weights.
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
    """Check that the files hold every byte that was written; collective: each rank reads its share of the files.

    Args:
        resumes: mark a damaged checkpoint, so that the run's next start passes over it.

    Raises:
        CheckpointError: a file is not what was written; raised on all ranks alike.
    """
    written, rank, ranks = checksums(path), dist.get_rank(), dist.get_world_size()
    if written is None:
        logger.warning("note: %s was written without checksums: changed bytes in it would not be noticed", path)
        return
    damage = checkpoint_sums.differing(path, dict(list(written.items())[rank::ranks]))
    damages: list[str | None] = [None] * ranks
    dist.all_gather_object(damages, damage)
    if (reason := next(filter(None, damages), None)) is not None:
        if resumes and rank == 0:
            mark_damaged(path, reason)
        then = "; --resume goes on from the checkpoint before" if resumes else ""
        raise CheckpointError(f"{path}: {reason}{then}")


def _without_missing_extras(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the state to load without the layers' extra state that the checkpoint lacks.

    Transformer Engine's layers keep FP8 scales in it. Other layers have fewer such entries, and a converted checkpoint none.
    """
    saved = load_sharded_metadata(str(path))

    def is_missing(part: Any) -> bool:
        return isinstance(part, ShardedObject) and part.key.endswith(_EXTRA) and part.unique_key not in saved

    return extract_matching_values(state, is_missing)[1]


def _fill(chunk: GPTModel, state: dict[str, Any]) -> None:
    """Load all weights of a chunk.

    Raises:
        CheckpointError: the checkpoint lacks a weight, or has one that the model lacks.
    """
    result = chunk.load_state_dict(state, strict=False)
    for name, parameter in chunk.named_parameters():
        if name in state:
            fp8_weights.keep_initial(parameter, state[name])
    wrong = [key for key in (*result.missing_keys, *result.unexpected_keys) if not key.endswith(_EXTRA)]
    if wrong:
        raise CheckpointError(f"the checkpoint and the model do not have the same weights: {', '.join(wrong[:3])}")


_EXTRA = "_extra_state"


def _new_folder(final: Path) -> Path:
    """Make a new folder beside `final`, the same on every rank, and remove those that earlier runs left unfinished.

    Its name has rank 0's process id in it: a writer of a killed run, should one still live, writes into another folder.
    """
    name = [f".{final.name}.{os.getpid()}.partial" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name, src=0)
    temporary = final.with_name(name[0])
    if dist.get_rank() == 0:
        for old in final.parent.glob(".step_*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    return temporary


def _put_in_place(temporary: Path, final: Path, model: Path, meta: dict[str, Any]) -> None:
    """Complete a checkpoint that every rank has written, and rename it to its final name; called in the training process."""
    if dist.get_rank() == 0:
        copy_side_files(model, temporary / SIDE_FILES)
        record(temporary, meta)
        swap_in(temporary, final)
    dist.barrier()


def _write_in_fork(write: Callable[..., None], folder: Path, rank: int, *arguments: Any, **named: Any) -> None:
    """Write this rank's files and note their checksums; called in the forked process, so that training need not wait.

    Args:
        write: Megatron's writer, which gets the other arguments.
    """
    # The fork inherits the rank's handlers; here a signal is to end the process and nothing else.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    # A fork does not inherit the request to die with its parent. The writer forks again, one process a file, which would
    # wait for a dead writer for ever.
    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
    torch.set_num_threads(1)  # a forked OpenMP pool has no threads, and waits for them for ever
    write(*arguments, **named)
    files = sorted(path.name for path in folder.glob(f"__{rank}_*"))  # as Megatron calls a rank's files
    checkpoint_sums.note(folder, rank, files)


def start_results_process() -> None:
    """Start the manager process in which Megatron's writers keep their results, unless it runs.

    Called before the model is built: forked then, the process costs nothing and keeps no copy of the model's memory. Megatron
    would spawn it at the first save, which imports everything again and takes seconds, and it would outlive a killed rank.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(initializer=die_with_parent)
        filesystem_async._results_queue = manager.Queue()


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}


def _restore_rng(path: Path) -> None:
    """Restore this rank's random generators if as many ranks wrote the checkpoint, on such a device; else they start from the
    seed. A CUDA generator's state has another form than a host's, which neither accepts of the other."""
    if len(list(path.glob("rng_*.pt"))) != dist.get_world_size():
        logger.warning("%s was written by another number of ranks: random generators start from trainer.seed", path)
        return
    state, tracker = torch.load(path / f"rng_{dist.get_rank()}.pt", weights_only=True), tensor_parallel.get_cuda_rng_tracker()
    torch.set_rng_state(state["torch"])
    sizes = {name: len(own) for name, own in tracker.get_states().items()}
    if {name: len(written) for name, written in state["tracker"].items()} != sizes:
        logger.warning("note: %s was written on another kind of device: its random generators start from trainer.seed", path)
        return
    tracker.set_states(state["tracker"])


def _state(chunks: Sequence[GPTModel], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """Return what is written of this rank, as views: loading fills the same state in place."""
    state: dict[str, Any] = {_key(chunks, i): chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded(optimizer, state)
    return state


def _without_copies(state: dict[str, Any]) -> dict[str, Any]:
    """Give each tensor of the host a storage of its own over the same memory, so that Megatron's writer does not copy it.

    It copies tensors that are a part of a larger storage, as all of a gradient or parameter buffer are. The copy is needless
    here: the forked writer has the memory as it was at the fork.
    """
    apply_factories(state)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor) and part.data.device.type == "cpu":
            part.data = torch.from_dlpack(part.data.detach())
    return state


def _key(chunks: Sequence[GPTModel], index: int) -> str:
    """Return the name under which Megatron's optimizer finds a chunk's part of a state."""
    return f"model{index}" if len(chunks) > 1 else "model"
