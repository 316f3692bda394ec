"""Conversion from Hugging Face folders to Megatron's format and back as a stream, which holds no more than a few tensors.

Two threads share the work, each with one source file mapped. An interrupted conversion continues where it was, and the target
appears when it is whole.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from megatron_hpt.checksum import checksum_of
from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import CheckpointError, ConfigError, ModelError
from megatron_hpt.files import continued_folder, synced
from megatron_hpt.models.checkpoint_layout import Chunk, Stored, chunks_by_rank, files, stored
from megatron_hpt.models.checkpoints import META, SIDE_FILES, checksums, damage, is_checkpoint, record, versions
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.hf_files import (
    DTYPES,
    INDEX,
    HfTensors,
    copy_side_files,
    dtype_change,
    write_config,
    write_safetensors,
)
from megatron_hpt.models.mapping import Place, ShardView, hf_tensor_shapes
from megatron_hpt.models.megatron_files import ChunkReader, ChunkWriter

logger = logging.getLogger(__name__)
WORKERS = 2
"""Threads: one reads while the other writes, and more would only hold more memory."""
_COPIES = 4
"""Most copies of a tensor at a time: as read, as put together, as written, and one whose memory is not yet given back."""
Finish = Callable[[], None]
"""Waits until the disk has a file, and has it count as written."""
Advance = Callable[[int], None]
"""Is called with the number of bytes that have been written since the last call."""


@dataclass(frozen=True)
class Size:
    """What a conversion will write."""

    files: int
    nbytes: int
    """Bytes of all weights."""
    memory: int
    """About how many bytes the conversion holds at a time beside the program itself."""


class ToMegatron:
    """One Hugging Face folder on its way to a Megatron checkpoint."""

    def __init__(self, source: Path, layout: ParallelConfig, dtype: torch.dtype | None) -> None:
        """Check the source and plan the files.

        Args:
            layout: the layout whose chunks and files are written; any layout can load them.
            dtype: dtype of the weights in the checkpoint; None: as in the folder.

        Raises:
            ModelError: the model is unsupported or damaged, or its weights are of several types and `dtype` is not given.
        """
        if is_checkpoint(source):
            raise ModelError(f"{source} is a checkpoint in Megatron's format already")
        self.shape = model_shape(source)
        self._source, self._tensors = source, HfTensors(source)
        self._tensors.check(self.shape)
        self._dtypes = self._stored_dtypes(dtype)
        itemsize = max(dtype.itemsize for dtype in self._dtypes.values())
        self._files = files(chunks_by_rank(self.shape, layout), itemsize)
        written = {"model": repr(self.shape), "layout": layout.model_dump(), "dtype": str(dtype)}
        self._job = {"from": _identity(self._tensors.files), **written, **versions()}

    def size(self) -> Size:
        """What will be written."""
        chunks = [chunk for group in self._files for chunk in group]
        sizes = list(map(self._nbytes, chunks))
        return Size(len(self._files), sum(sizes), WORKERS * _COPIES * max(sizes))

    def write(self, target: Path, advance: Advance = lambda _: None) -> None:
        """Write the checkpoint.

        Raises:
            ModelError: the target exists, or the disk has no room for it.
        """
        _check_target(target, self._source, self.size().nbytes)
        with continued_folder(target, self._job) as folder:
            writer = ChunkWriter(folder, self._files, self._dtypes)
            _work(partial(self._write_file, writer, advance), range(len(self._files)))
            writer.finish()
            copy_side_files(self._source, folder / SIDE_FILES)
            _record_dtype(folder / SIDE_FILES, self._dtypes)
            record(folder, {"step": 0, "optimizer": False})

    def _write_file(self, writer: ChunkWriter, advance: Advance, number: int) -> Finish:
        def tensor_of(chunk: Chunk) -> Tensor:
            advance(self._nbytes(chunk))
            return self._read(chunk)

        if writer.is_written(number):
            advance(sum(map(self._nbytes, self._files[number])))
            return _nothing
        return writer.write(number, tensor_of)

    def _read(self, chunk: Chunk) -> Tensor:
        """Put the shard of a rank together from boxes of the folder's tensors."""
        item, dtype = chunk.stored, self._dtypes[chunk.stored.key]
        sizes = item.part.shard_sizes(self.shape, chunk.place.size)
        views = self._views(chunk, torch.empty(sizes, device="meta"))
        if len(views) == 1 and views[0].view.shape == sizes:
            (view,) = views
            return self._cast(view.name, self._tensors.box(view.name, view.offset, view.extent), dtype)
        shard = torch.zeros(sizes, dtype=dtype)  # rows that only pad the vocabulary
        for view in self._views(chunk, shard):
            view.write_box(self._cast(view.name, self._tensors.box(view.name, view.offset, view.extent), dtype))
        return shard

    def _cast(self, name: str, box: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert a box to the checkpoint's type.

        Raises:
            ModelError: a number does not fit into it.
        """
        if box.dtype is dtype:
            return box
        cast = box.to(dtype)
        if not torch.equal(cast.isfinite(), box.isfinite()):
            raise ModelError(f"{self._source}: {name} has numbers beyond what {dtype} can hold; give another --dtype")
        return cast

    def _views(self, chunk: Chunk, shard: Tensor) -> list[ShardView]:
        return list(chunk.stored.part.views(shard, self.shape, chunk.place, chunk.stored.parameter.indices))

    def _nbytes(self, chunk: Chunk) -> int:
        return chunk.volume * self._dtypes[chunk.stored.key].itemsize

    def _stored_dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Return the dtype of every tensor of the checkpoint, each of which is made of many in the folder.

        Raises:
            ModelError: those are of several types, and `dtype` is None.
        """
        kinds: dict[str, str] = {}
        for item in stored(self.shape):
            for name in item.parameter.tensors(self.shape):
                kind = self._tensors.entries[name].dtype
                if dtype is None and kinds.setdefault(item.key, kind) != kind:
                    raise ModelError(
                        f"{self._source}: {name} is of type {kind}, other tensors of {item.key} are {kinds[item.key]}; a "
                        "checkpoint has one type for all layers: give --dtype"
                    )
        return {item.key: dtype or getattr(torch, DTYPES[kinds[item.key]]) for item in stored(self.shape)}


class ToHf:
    """One Megatron checkpoint on its way to a Hugging Face folder."""

    def __init__(self, checkpoint: Path, shard_size: int | str = "5GB", like: Path | None = None) -> None:
        """Check the source and plan the files.

        Args:
            shard_size: most bytes of one safetensors file, as a number or as "5GB"; a larger tensor has a file of its own.
            like: folder of configuration and tokenizer, for a checkpoint without them.

        Raises:
            CheckpointError: the folder is not a checkpoint, is damaged, or has no configuration.
            ConfigError: the shard size is not one.
            ModelError: the model is unsupported.
        """
        self._side = side_files(checkpoint, like)
        self.shape = model_shape(self._side)
        self._reader = ChunkReader(checkpoint, self.shape)
        self._origin = {
            name.format(*item.parameter.indices): item for item in stored(self.shape) for name in item.part.tensors(self.shape)
        }
        self._sizes = hf_tensor_shapes(self.shape)
        self._nbytes = {
            name: math.prod(size) * self._reader.dtypes[self._origin[name].key].itemsize for name, size in self._sizes.items()
        }
        split = _split(self._nbytes, shard_size)
        self._shards = split.filename_to_tensors
        self._weight_map = split.tensor_to_filename if split.is_sharded else None
        written = {"model": repr(self.shape), "shards": self._shards}
        self._job = {"from": _identity(sorted(checkpoint.iterdir())), **written, **versions()}

    def size(self) -> Size:
        """What will be written."""
        shards = [sum(map(self._nbytes.__getitem__, names)) for names in self._shards.values()]
        parts: Counter[Stored] = Counter()
        for name, item in self._origin.items():
            parts[item] += self._nbytes[name]
        return Size(len(shards), sum(shards), WORKERS * _COPIES * max(parts.values()))

    def write(self, target: Path, advance: Advance = lambda _: None) -> None:
        """Write the folder.

        Raises:
            ModelError: the target exists, or the disk has no room for it.
        """
        _check_target(target, self._side, self.size().nbytes)
        with continued_folder(target, self._job) as folder:
            _work(partial(self._write_shard, folder, advance), self._shards)
            if self._weight_map is not None:
                total = {"metadata": {"total_size": sum(self._nbytes.values())}, "weight_map": self._weight_map}
                (folder / INDEX).write_text(json.dumps(total, indent=2) + "\n", encoding="utf-8")
            copy_side_files(self._side, folder)
            _record_dtype(folder, self._reader.dtypes)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of the model by their Hugging Face names, each read when it is its turn."""
        wanted = dict.fromkeys(names)
        for item in dict.fromkeys(self._origin[name] for name in wanted):
            whole = self._reader.read(item)
            for view in item.part.views(whole, self.shape, Place(), item.parameter.indices):
                if view.name in wanted:
                    yield view.name, view.read().contiguous()

    def _write_shard(self, folder: Path, advance: Advance, file: str) -> Finish:
        names = self._shards[file]
        if (folder / file).is_file():
            advance(sum(map(self._nbytes.__getitem__, names)))
            return _nothing
        dtype_of = self._dtype_of
        # As safetensors' own writer: the widest first, so that every tensor is aligned.
        ordered = sorted(names, key=lambda name: -dtype_of(name).itemsize)

        def read() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.tensors(ordered):
                advance(tensor.nbytes)
                yield name, tensor

        temporary = folder / f".{file}"
        write_safetensors(temporary, {name: (self._sizes[name], dtype_of(name)) for name in ordered}, _ahead(read()))

        def finish() -> None:
            synced(temporary)
            temporary.rename(folder / file)

        return finish

    def _dtype_of(self, name: str) -> torch.dtype:
        return self._reader.dtypes[self._origin[name].key]


def _split(nbytes: dict[str, int], shard_size: int | str) -> StateDictSplit:
    """Share tensors out to files as transformers would."""
    try:
        return split_state_dict_into_shards_factory(
            nbytes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=int(shard_size) if str(shard_size).isdigit() else shard_size,
        )
    except ValueError as error:
        raise ConfigError(f"shard size: given {shard_size!r}; bytes, or such as 5GB or 500MB: {error}") from None


def side_files(checkpoint: Path, like: Path | None = None) -> Path:
    """Return the folder of a checkpoint's configuration and tokenizer, once its files have been found whole.

    Args:
        like: a folder of the same model, for checkpoints that other programs wrote.

    Raises:
        CheckpointError: the checkpoint is damaged, or has none and `like` is not given, or has its own and `like` is.
    """
    if (checkpoint / META).is_file():
        if checksums(checkpoint) is None:
            logger.warning("note: %s was written without checksums: changed bytes in it would not be noticed", checkpoint)
        if reason := damage(checkpoint):
            raise CheckpointError(f"{checkpoint}: {reason}")
    own = checkpoint / SIDE_FILES
    if like is not None and not own.is_dir():
        return like
    if like is not None:
        raise CheckpointError(f"{checkpoint} has its own configuration in {SIDE_FILES}/: leave --like out")
    if not own.is_dir():
        raise CheckpointError(
            f"{checkpoint}: has no folder {SIDE_FILES!r} with the model's configuration and tokenizer; give --like with a "
            "Hugging Face folder of the same model"
        )
    return own


@dataclass(frozen=True)
class Compared:
    """One tensor of a folder and of a checkpoint, compared."""

    name: str
    sizes: tuple[int, ...]
    dtype: str
    """In the checkpoint."""
    was: str
    """In the folder."""
    hf: int
    """Checksum of the folder's tensor, converted to the checkpoint's type."""
    megatron: int
    """Checksum of the checkpoint's tensor."""
    nbytes: int


def compare(hf: Path, checkpoint: Path) -> tuple[Size, Iterator[Compared]]:
    """Compare a folder with a checkpoint, tensor by tensor.

    Returns:
        The size of what will be compared, and the comparisons, each made when it is asked for.

    Raises:
        ModelError, CheckpointError: one of them is damaged, or they are not of one model.
    """
    shape, tensors = model_shape(hf), HfTensors(hf)
    tensors.check(shape)
    other = ToHf(checkpoint, like=None if (checkpoint / SIDE_FILES).is_dir() else hf)
    if other.shape != shape:
        raise CheckpointError(f"{checkpoint} is of another model than {hf}: {other.shape}, and {shape}")

    def compared() -> Iterator[Compared]:
        for name, tensor in other.tensors(hf_tensor_shapes(other.shape)):
            mine = tensors.get(name)
            kinds = (str(found.dtype).removeprefix("torch.") for found in (tensor, mine))
            sums = (checksum_of(mine.to(tensor.dtype)), checksum_of(tensor))
            yield Compared(name, tuple(tensor.shape), *kinds, *sums, tensor.nbytes)

    return other.size(), compared()


def _check_target(target: Path, source: Path, nbytes: int) -> None:
    if os.path.lexists(target):
        raise ModelError(f"{target} exists; give a new folder")
    if source.resolve() in target.resolve().parents:
        raise ModelError(f"{target} lies in {source}, which is what is converted; give a folder outside of it")
    place = next(folder for folder in target.resolve().parents if folder.is_dir())
    there = sum(file.stat().st_size for file in target.with_name(f".{target.name}.partial").rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + there
    if free < nbytes:
        raise ModelError(f"{target}: {nbytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free in {place}")


def _identity(paths: Iterable[Path]) -> list[list[Any]]:
    """Return what changes when one of the files does."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]


def _record_dtype(folder: Path, dtypes: dict[str, torch.dtype]) -> None:
    """Write the weights' dtype into config.json, where they have a single one."""
    if len(different := set(dtypes.values())) == 1:
        write_config(folder, dtype_change(folder, str(different.pop()).removeprefix("torch.")))


def _work(task: Callable[[Any], Finish], items: Iterable[Any]) -> None:
    """Write the file of every item with `WORKERS` threads, while another waits for the disk; the first error ends it."""
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as disk:
        running = [pool.submit(task, item) for item in items]
        try:
            finishing: list[Future[None]] = []
            for future in as_completed(running):
                finishing.append(disk.submit(future.result()))
                for finished in (wait for wait in finishing if wait.done()):
                    finished.result()
            for finished in finishing:
                finished.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the same items, each made by another thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1) as maker:
        following = maker.submit(next, items, end)
        while (item := following.result()) is not end:
            following = maker.submit(next, items, end)
            yield item


def _nothing() -> None:
    """Do nothing: the `Finish` of a file that was there."""
