"""Checkpoints on disk, described as what travels: an engine reads the tensors of a folder's safetensors in place.

The folder is a Hugging Face model, or a version that the transport ``files`` has written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hpt.checksum import checksum_of
from megatron_hpt.errors import ModelError, TransferError
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.hf_files import DTYPES, HfTensors, weight_files
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.transfer.boxes import whole
from megatron_hpt.transfer.manifest import Contents, Manifest, Piece, session_name
from megatron_hpt.transfer.transports.mapped import MappedBytes


def describe(folder: Path, version: int) -> tuple[Contents, Manifest]:
    """Return the contents and the manifest of a checkpoint, ready for `EngineControl.prepare` and `update`.

    Args:
        version: the number that engines will report; a version written by ``files`` has its own instead.

    Raises:
        ModelError, TransferError: it is no checkpoint, or a damaged one.
    """
    if (folder / "manifest.json").is_file():
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return Contents.from_json(data["contents"]), Manifest.from_json(data["manifest"])
    shape = model_shape(folder)
    HfTensors(folder).check(shape)
    shapes = hf_tensor_shapes(shape)
    sources, pieces, dtypes = [], {}, set()
    for number, path in enumerate(weight_files(folder)):
        sources.append({"path": str(path.resolve()), "nbytes": path.stat().st_size, "owner": str(path)})
        for name, dtype, start, nbytes in _entries(path):
            dtypes.add(dtype)
            pieces[name] = Piece(name, whole(shapes[name]), number, start, nbytes)
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ModelError(f"{folder}: tensors of dtypes {sorted(dtypes)}; one of {', '.join(DTYPES)} throughout can be sent")
    ordered = tuple(pieces[name] for name in shapes)
    contents = Contents(session_name(), "shared_memory", DTYPES[dtypes.pop()], shapes, tuple(sources), ordered)
    return contents, Manifest(contents.session, contents.digest, version, _checksums(contents), compare=True)


def _entries(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield (name, dtype, first byte, bytes) of every tensor in a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield name, entry["dtype"], 8 + size + start, end - start


def _checksums(contents: Contents) -> tuple[int, ...]:
    files = [MappedBytes(source) for source in contents.sources]
    for piece in contents.pieces:
        if piece.position % 2:
            raise TransferError(f"{piece.name} starts at an odd byte of {contents.sources[piece.source]['path']}")
    return tuple(checksum_of(files[piece.source].view(piece.position, piece.nbytes)) for piece in contents.pieces)
