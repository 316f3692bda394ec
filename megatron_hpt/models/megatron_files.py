"""Reading and writing Megatron's distributed checkpoints tensor by tensor, without Megatron and without its model.

Megatron's format is torch's distributed checkpoint plus two small files (megatron/core/dist_checkpointing: core.py,
strategies/common.py), so torch's own storage classes read and write it here. Their planners ask for a tensor at the moment
it is written, which makes the work a stream.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_hpt.errors import CheckpointError
from megatron_hpt.files import synced, whole
from megatron_hpt.models import checkpoint_sums
from megatron_hpt.models.checkpoint_layout import Chunk, Stored, stored
from megatron_hpt.models.checkpoints import checksums, is_checkpoint
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import Sizes

_PROGRESS = ".written"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class ChunkWriter:
    """Writes the files of one checkpoint into a folder, by several threads and, after an interruption, several processes."""

    def __init__(self, folder: Path, files: Sequence[Sequence[Chunk]], dtypes: dict[str, torch.dtype]) -> None:
        """Plan the files.

        Args:
            dtypes: checkpoint key → dtype.
        """
        self._folder, self._files = folder, files
        self._storage = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False)
        plans = [SavePlan([_write_item(chunk, dtypes[chunk.stored.key]) for chunk in chunks]) for chunks in files]
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._storage.prepare_global_plan(plans)
        (folder / _PROGRESS).mkdir(exist_ok=True)

    def is_written(self, number: int) -> bool:
        """Whether a file is there and whole."""
        return self._note(number).is_file()

    def write(self, number: int, tensor_of: Callable[[Chunk], Tensor]) -> Callable[[], None]:
        """Write one file.

        Args:
            tensor_of: makes a chunk's tensor when it is its turn, of the chunk's extent without the leading ones.

        Returns:
            A function that waits until the disk has the file, and notes that it is written.
        """
        chunks = {_index(chunk): chunk for chunk in self._files[number]}
        written = self._storage.write_data(self._plans[number], _SaveStream(chunks, tensor_of)).value()

        def finish() -> None:
            for name in {result.storage_data.relative_path for result in written}:
                synced(self._folder / name)
            checkpoint_sums.note(self._folder, number, sorted({result.storage_data.relative_path for result in written}))
            with whole(self._note(number)) as temporary:
                temporary.write_bytes(pickle.dumps(written))

        return finish

    def finish(self) -> None:
        """Write what makes the files a checkpoint, once all of them have been written."""
        results: list[list[WriteResult]] = [pickle.loads(self._note(i).read_bytes()) for i in range(len(self._files))]
        self._storage.finish(self._metadata, results)
        shutil.rmtree(self._folder / _PROGRESS)
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(_BACKENDS), encoding="utf-8")

    def _note(self, number: int) -> Path:
        return self._folder / _PROGRESS / str(number)


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.stored.key, torch.Size(chunk.offset))


def _write_item(chunk: Chunk, dtype: torch.dtype) -> WriteItem:
    where = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.extent))
    data = TensorWriteData(where, TensorProperties(dtype=dtype), torch.Size(chunk.sizes))
    return WriteItem(index=_index(chunk), type=WriteItemType.SHARD, tensor_data=data)


class _SaveStream(DefaultSavePlanner):
    """Makes each tensor when it is written."""

    def __init__(self, chunks: dict[MetadataIndex, Chunk], tensor_of: Callable[[Chunk], Tensor]) -> None:
        super().__init__()
        self._chunks, self._tensor_of = chunks, tensor_of

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = self._chunks[write_item.index]
        return self._tensor_of(chunk).view(chunk.extent)


class ChunkReader:
    """Reads stored tensors of a checkpoint that any layout has written; threads may share it."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        """Read what the checkpoint holds.

        Raises:
            CheckpointError: the folder is not a checkpoint, a file is truncated, or it is of another model; names the tensors.
        """
        self._folder, self._shape = folder, shape
        self._sums = checksums(folder) if is_checkpoint(folder) else None
        self._right: set[tuple[str, int]] = set()
        """(file, number) of blocks whose bytes have been found right."""
        reader = FileSystemReader(folder)
        try:
            self._metadata = reader.read_metadata()
        except Exception as error:  # a damaged pickle may raise anything
            hint = "; it is a Hugging Face folder" if (folder / "config.json").is_file() else ""
            raise CheckpointError(f"{folder}: not a checkpoint in Megatron's distributed format{hint}: {error!r}") from error
        self._check_files()
        self.dtypes = self._check_tensors()
        self._chunks: dict[tuple[str, Sizes], list[ChunkStorageMetadata]] = {}
        for key in self.dtypes:
            for chunk in self._metadata.state_dict_metadata[key].chunks:
                self._chunks.setdefault((key, tuple(chunk.offsets[: _leading(key)])), []).append(chunk)

    def read(self, item: Stored) -> Tensor:
        """Read one part of a parameter, as a single tensor parallel rank would hold it, without padding.

        Raises:
            CheckpointError: its chunks do not hold all of it, cannot be read, or are not what was written.
        """
        offset, extent = (torch.Size(sizes) for sizes in item.box(self._shape))
        target = torch.empty(extent, dtype=self.dtypes[item.key])
        stored = self._metadata.state_dict_metadata[item.key]
        near = TensorStorageMetadata(stored.properties, stored.size, self._chunks[item.key, item.parameter.indices])
        items = create_read_items_for_chunk_list(item.key, near, [ChunkStorageMetadata(offset, extent)])
        if sum(math.prod(read.lengths) for read in items) != target.numel():
            raise CheckpointError(f"{self._folder}: the chunks of {item.key} do not hold all of {item.parameter.name}")
        self._check_bytes(items)
        reader = FileSystemReader(self._folder)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        try:
            reader.read_data(LoadPlan(items), _LoadInto(target)).wait()
        except Exception as error:  # a damaged pickle may raise anything
            files = {self._metadata.storage_data[read.storage_index].relative_path for read in items}
            raise CheckpointError(
                f"{self._folder}: {item.parameter.name} cannot be read from {', '.join(sorted(files))}: damaged"
            ) from error
        return target.view(extent[len(item.parameter.indices) :])

    def _check_bytes(self, items: Sequence[ReadItem]) -> None:
        """Check blocks just before they are read, so that the disk is asked once, and each of them once.

        Raises:
            CheckpointError: names the first block whose bytes are not those that were written.
        """
        wanted: dict[str, list[int]] = {}
        for item in items:
            stored = self._metadata.storage_data[item.storage_index]
            blocks = checkpoint_sums.touched(stored.offset, stored.length)
            new = [number for number in blocks if (stored.relative_path, number) not in self._right]
            wanted.setdefault(stored.relative_path, []).extend(new)
        if self._sums is None:
            return
        if (reason := checkpoint_sums.differing(self._folder, self._sums, wanted)) is not None:
            raise CheckpointError(f"{self._folder}: {reason}")
        self._right |= {(name, number) for name, numbers in wanted.items() for number in numbers}

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            path = self._folder / name
            if not path.is_file():
                raise CheckpointError(f"{self._folder}: {name} is missing")
            if path.stat().st_size < end:
                raise CheckpointError(f"{path}: truncated: {path.stat().st_size} bytes, {end} were written")

    def _check_tensors(self) -> dict[str, torch.dtype]:
        found = {
            key: entry for key, entry in self._metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        expected = {item.key: item for item in stored(self._shape)}
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(key for key in found.keys() - expected.keys() if key.startswith(_MODEL))
        if missing or extra:
            raise CheckpointError(f"{self._folder}: missing tensors {missing[:3]}, unexpected tensors {extra[:3]}")
        for key, item in expected.items():
            sizes, wanted = tuple(found[key].size), item.sizes(self._shape)
            padded = getattr(item.part, "padded", False)
            if len(sizes) != len(wanted) or any(a < b if padded else a != b for a, b in zip(sizes, wanted, strict=True)):
                raise CheckpointError(f"{self._folder}: {key} has shape {sizes}, config.json implies {wanted}")
        return {key: found[key].properties.dtype for key in expected}


_MODEL = ("embedding.", "decoder.", "output_layer.")
"""Beginnings of the model's keys; a checkpoint's other tensors are optimizer state."""


def _leading(key: str) -> int:
    """Return the number of dimensions, of layers and experts, before a parameter's own."""
    return 2 if ".experts.experts." in key else int(".layers." in key)


class _LoadInto(DefaultLoadPlanner):
    """Gives the storage the parts of one tensor to fill."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # filled in place
