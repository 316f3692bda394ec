"""Versions as files, for engines that share no host and no network fabric with the trainer, but a file system.

    FOLDER/SESSION/version_000012/rank_0003.safetensors     a rank's boxes, named ``tensor@offset``
    FOLDER/SESSION/version_000013/rank_0003.delta           only what changed since the version before
    FOLDER/SESSION/version_000013/manifest.json             written last: a version without it is not one

A session is one trainer from its start to its end, so versions of an earlier run, of other sizes or numbers, never mix with it.
A file appears under its name when it is whole. Old versions are removed, never one that a kept version builds upon.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hpt.checksum import copy_and_hash
from megatron_hpt.errors import TransferError
from megatron_hpt.files import write_whole
from megatron_hpt.models.hf_files import safetensors_header
from megatron_hpt.transfer.boxes import Box
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece
from megatron_hpt.transfer.transports.mapped import MappedBytes

KEPT = 3
"""Newest versions that stay: more than one, as a slow engine may still be reading an older one."""
_SPARSE = 0.3
"""Share of changed elements up to which their positions and values are smaller than the piece."""
_HEADER = struct.Struct("<QIII")
"""Delta record: piece, kind (0: all bytes, 1: positions and values), element bytes, elements."""


def version_folder(folder: Path, version: int) -> Path:
    """Return where a version lies."""
    return folder / f"version_{version:06d}"


def versions(folder: Path) -> list[int]:
    """Return the versions that are whole, oldest first."""
    matches = (re.fullmatch(r"version_(\d{6,})", path.parent.name) for path in folder.glob("version_*/manifest.json"))
    return sorted(int(match[1]) for match in matches if match)


class FileSink:
    """Sending end on one rank: it keeps the bytes of its file in memory, and of the version before for differences."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        boxes: Sequence[tuple[str, Box]],
        dtypes: Sequence[torch.dtype],
        full_every: int,
    ) -> None:
        """Lay out this rank's file.

        Args:
            full_every: every k-th version is written whole, those between as what changed.
        """
        self._folder, self._rank, self._full_every = folder, rank, full_every
        self._sizes = [box.volume * dtype.itemsize for (_, box), dtype in zip(boxes, dtypes, strict=True)]
        self._items = [dtype.itemsize for dtype in dtypes]
        names = (f"{name}@{','.join(map(str, box.offset))}" for name, box in boxes)
        extents = (box.extent for _, box in boxes)
        self._header = safetensors_header(zip(names, extents, dtypes, strict=True))
        self.positions, end = [], len(self._header)
        for nbytes in self._sizes:
            self.positions.append(end)
            end += nbytes
        self._bytes = torch.empty(end, dtype=torch.uint8)
        self._bytes[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        self._before: Tensor | None = None
        self._written = 0
        self._last = -1
        self.source = {
            "path": f"{folder}/version_{{version:06d}}/rank_{rank:04d}.safetensors",
            "nbytes": end,
            "owner": f"actor rank {rank}, {folder}",
            # Differences name a piece by its place here.
            "layout": list(zip(self.positions, self._sizes, strict=True)),
        }

    def put(self, index: int, value: Tensor) -> int:
        """Copy a box into the bytes of the file, and return its checksum."""
        place = self._bytes[self.positions[index] :][: self._sizes[index]]
        return copy_and_hash(place.view(value.dtype).view(value.shape) if value.nbytes else value, value)

    def commit(self, version: int) -> None:
        """Write the version's file.

        Raises:
            TransferError: the disk is full, or the folder cannot be written.
        """
        full = self._before is None or self._written % self._full_every == 0
        path = version_folder(self._folder, version) / f"rank_{self._rank:04d}.{'safetensors' if full else 'delta'}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, self._bytes.numpy() if full else self._changes())
            path.with_suffix(".delta" if full else ".safetensors").unlink(missing_ok=True)  # of the run before a resume
        except OSError as error:
            raise TransferError(f"version {version} could not be written to {path}: {error}") from None
        if self._full_every > 1:
            self._before = self._bytes.clone() if self._before is None else self._before.copy_(self._bytes)
        self._written += 1
        self._last = version

    def _changes(self) -> np.ndarray:
        chunks = [np.frombuffer(struct.pack("<Q", self._last), np.uint8)]
        for index, (position, size) in enumerate(zip(self.positions, self._sizes, strict=True)):
            new, old = self._bytes[position:][:size].numpy(), self._before[position:][:size].numpy()
            chunks += _difference(index, new, old, self._items[index])
        return np.concatenate(chunks)

    def close(self) -> None:
        """Free the memory; files stay, since engines may start from them."""
        self._bytes, self._before = torch.empty(0, dtype=torch.uint8), None


def _difference(index: int, new: np.ndarray, old: np.ndarray, item: int) -> list[np.ndarray]:
    """Return the record of one piece, or nothing where nothing changed.

    Elements are compared by their bits, so a change of NaN or of the sign of zero counts.
    """
    unit = np.dtype(f"u{item}")
    new, old = new.view(unit), old.view(unit)
    changed = np.flatnonzero(new != old).astype(np.uint32)
    if not len(changed):
        return []
    if len(changed) > _SPARSE * len(new):
        return [np.frombuffer(_HEADER.pack(index, 0, item, len(new)), np.uint8), new.view(np.uint8)]
    record = np.frombuffer(_HEADER.pack(index, 1, item, len(changed)), np.uint8)
    return [record, changed.view(np.uint8), new[changed].view(np.uint8)]


def _write(path: Path, data: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            data.tofile(file)
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def announce(folder: Path, contents: Contents, manifest: Manifest) -> None:
    """Write the manifest of a version whose files are all there, and remove what is no longer needed; rank 0 only."""
    place = version_folder(folder, manifest.version)
    write_whole(place / "manifest.json", json.dumps({"contents": contents.to_json(), "manifest": manifest.to_json()}))
    prune(folder, KEPT)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest versions and those that they build upon."""
    whole_ones = versions(folder)
    first = max(0, len(whole_ones) - keep)
    while first > 0 and list(version_folder(folder, whole_ones[first]).glob("*.delta")):
        first -= 1
    for version in whole_ones[:first]:
        shutil.rmtree(version_folder(folder, version), ignore_errors=True)


class FileIncoming:
    """Receiving end: it reads whole files in place, and applies differences to a copy of the version before."""

    whole = True

    def __init__(self, sources: Sequence[dict[str, Any]], pieces: Sequence[tuple[int, Piece]]) -> None:
        self._sources, self._pieces = sources, list(pieces)
        self._files: dict[int, _RankFile] = {}

    def receive(self, version: int) -> Iterator[tuple[int, Piece]]:
        """Bring every file that this rank needs to `version`, and yield all pieces.

        Raises:
            TransferError: a file is missing or damaged, or one that it builds upon is.
        """
        for _, piece in self._pieces:
            if piece.source not in self._files:
                self._files[piece.source] = _RankFile(self._sources[piece.source])
        for file in self._files.values():
            file.bring(version)
        yield from self._pieces

    def view(self, number: int, piece: Piece) -> Tensor:
        return self._files[piece.source].view(piece)

    def close(self) -> None:
        """Unmap all files."""
        self._files.clear()


class _RankFile:
    """One rank's bytes at one version."""

    def __init__(self, source: dict[str, Any]) -> None:
        self._source, self._layout = source, source.get("layout", [])
        self._version: int | None = None
        self._mapped: MappedBytes | None = None
        self._own: Tensor | None = None

    def bring(self, version: int) -> None:
        """Read a version, after the versions that it builds upon where they have not been read."""
        path = Path(self._source["path"].format(version=version))
        if path.is_file():
            self._mapped, self._own, self._version = MappedBytes({**self._source, "path": str(path)}), None, version
            return
        delta = path.with_suffix(".delta")
        try:
            data = np.fromfile(delta, np.uint8)
        except OSError:
            raise TransferError(
                f"{self._source['owner']}: version {version} has neither {path.name} nor {delta.name}"
            ) from None
        base = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else -1
        if self._version != base:
            if not 0 <= base < version:
                raise TransferError(f"{delta} is damaged: it builds upon version {base}")
            self.bring(base)
        self._apply(data, delta)
        self._version = version

    def _apply(self, data: np.ndarray, path: Path) -> None:
        if self._own is None:
            self._own = self._mapped.view(0, int(self._source["nbytes"])).clone()
        target, at = self._own.numpy(), 8
        self._version = None  # neither the old nor the new one until all is applied
        try:
            while at < len(data):
                index, kind, item, count = _HEADER.unpack_from(data, at)
                at += _HEADER.size
                position, size = self._layout[index]
                piece = target[position : position + size].view(f"u{item}")
                if kind:
                    where = data[at : at + 4 * count].view(np.uint32)
                    at += 4 * count
                    piece[where] = data[at : at + item * count].view(f"u{item}")
                else:
                    piece[:] = data[at : at + item * count].view(f"u{item}")
                at += item * count
        except (struct.error, IndexError, ValueError) as error:
            raise TransferError(f"{path} is damaged: {error}") from None

    def view(self, piece: Piece) -> Tensor:
        if self._own is None:
            return self._mapped.view(piece.position, piece.nbytes)
        return self._own[piece.position : piece.position + piece.nbytes]
