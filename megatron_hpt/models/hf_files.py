"""Safetensors of a Hugging Face folder, read lazily by name and checked against the configuration; side files."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hpt.checksum import as_bytes
from megatron_hpt.errors import ModelError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import Sizes, hf_tensor_shapes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Types of weights that can be converted: safetensors' name → torch's."""
_NAMES = {torch_name: name for name, torch_name in DTYPES.items()} | {"float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated*.pth"),
    *("*.gguf", "tf_model*.h5", "flax_model*.msgpack"),
)
"""Names of files of weights in the formats of the field."""
_NOT_THE_MODEL = (".git", ".cache", "checkpoint-*")
"""Folders that downloads and transformers' trainer leave in a model's folder."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder that transformers would read.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{folder / INDEX}: not an index of safetensors files: {error!r}") from None
        if (folder / SINGLE).is_file() and SINGLE not in names:
            raise ModelError(f"model.path: {folder} has {SINGLE} and {INDEX}, which does not name it: remove one of them")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"model.path: {folder}: {INDEX} names files that are not there: {', '.join(missing[:3])}")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(path.name for pattern in _WEIGHTS for path in folder.glob(pattern))
    found = f"; there is {', '.join(others[:3])}: save it with transformers' save_pretrained first" if others else ""
    raise ModelError(f"model.path: {folder} has no *.safetensors files ({SINGLE}, or {INDEX} and what it names){found}")


def safetensors_header(tensors: Iterable[tuple[str, Sizes, torch.dtype]], metadata: dict[str, str] | None = None) -> bytes:
    """Return the beginning of a safetensors file whose tensors follow in this order, without gaps.

    It is a length, then JSON, padded so that the data is aligned (https://github.com/huggingface/safetensors, "Format").

    Args:
        tensors: name, shape and dtype of each tensor.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, sizes, dtype in tensors:
        start, end = end, end + math.prod(sizes) * dtype.itemsize
        kind = _NAMES[str(dtype).removeprefix("torch.")]
        entries[name] = {"dtype": kind, "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path, described: dict[str, tuple[Sizes, torch.dtype]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file as its tensors come, so that it is never in memory as a whole.

    Args:
        described: name → shape and dtype of the tensors, in the order in which they come.

    Raises:
        ValueError: another tensor came; the file is not whole.
    """
    with path.open("wb") as file:
        entries = ((name, sizes, dtype) for name, (sizes, dtype) in described.items())
        file.write(safetensors_header(entries, {"format": "pt"}))
        for expected, (name, tensor) in zip(described, tensors, strict=True):
            if name != expected:
                raise ValueError(f"{name} came where {expected} was described")
            file.write(as_bytes(tensor.contiguous()).numpy())


def copy_side_files(source: Path, target: Path) -> None:
    """Copy everything but weights into the folder `target`: configurations, tokenizer, chat template, and anything else.

    Contents alone are copied: a read-only folder or a cache of links gives plain files that may be changed.
    """
    for folder, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not _matches(name, _NOT_THE_MODEL)]
        into = target / Path(folder).relative_to(source)
        into.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not _matches(name, _WEIGHTS):
                shutil.copyfile(Path(folder) / name, into / name)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def write_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change keys of a folder's config.json; without changes the file stays as it is."""
    if changes:
        file = folder / "config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}, indent=2) + "\n", encoding="utf-8"
        )


def dtype_change(folder: Path, dtype: str) -> dict[str, str]:
    """Return what must change in a config.json that names the weights' dtype (transformers 5 renamed the key)."""
    there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: dtype for key in ("dtype", "torch_dtype") if there.get(key) not in (None, dtype)}


@dataclass(frozen=True)
class TensorEntry:
    """What a file's header says about a tensor."""

    file: Path
    sizes: Sizes
    dtype: str
    """By safetensors' name."""


class HfTensors:
    """The tensors of one folder. A thread has one file open at a time, so that no more than that is mapped."""

    def __init__(self, folder: str | Path) -> None:
        """Read the headers of the folder's files.

        Raises:
            ModelError: there are no safetensors files, one is damaged, or two of them have the same tensor.
        """
        self._folder = Path(folder)
        self._open = threading.local()
        self.files = weight_files(self._folder)
        self.entries: dict[str, TensorEntry] = {}
        for path in self.files:
            for name, entry in _entries(path).items():
                if name in self.entries:
                    raise ModelError(f"{path}: {name} is also in {self.entries[name].file.name}")
                self.entries[name] = entry

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)

    def get(self, name: str) -> Tensor:
        """Read one tensor; the folder has passed `check`."""
        return self._file(self.entries[name].file).get_tensor(name)

    def box(self, name: str, offset: Sizes, extent: Sizes) -> Tensor:
        """Read a part of one tensor, and no more than its rows."""
        entry = self.entries[name]
        if extent == entry.sizes:
            return self.get(name)
        part = self._file(entry.file).get_slice(name)
        return part[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))]

    def check(self, shape: ModelShape) -> None:
        """Check that every tensor of the model is there with its shape, and no other.

        Raises:
            ModelError: names the tensors.
        """
        expected = hf_tensor_shapes(shape)
        if shape.tied_embeddings and _OUTPUT in self.entries:
            self._drop_copy()
        missing, extra = expected.keys() - self.entries.keys(), self.entries.keys() - expected.keys()
        if missing or extra:
            raise ModelError(
                f"model.path: {self._folder}: missing tensors {sorted(missing)[:3]}, unexpected tensors {sorted(extra)[:3]}"
            )
        for name, sizes in expected.items():
            found = self.entries[name]
            if found.sizes != sizes:
                raise ModelError(f"model.path: {self._folder}: {name} has shape {found.sizes}, config.json implies {sizes}")
            if found.dtype not in DTYPES:
                raise ModelError(
                    f"model.path: {self._folder}: {name} is of type {found.dtype}; weights must be one of {', '.join(DTYPES)}"
                )

    def _drop_copy(self) -> None:
        """Ignore the copy of the embedding that some tied models are published with as output layer, as transformers does."""
        if self.entries.get(_EMBEDDING) is None or not torch.equal(*(_bits(self.get(name)) for name in (_OUTPUT, _EMBEDDING))):
            raise ModelError(
                f"model.path: {self._folder}: {_OUTPUT} is not the embedding, although config.json says tie_word_embeddings"
            )
        del self.entries[_OUTPUT]

    def _file(self, path: Path) -> Any:
        if getattr(self._open, "path", None) != path:
            self._open.file = None  # unmapped before the next is mapped
            self._open.path, self._open.file = path, safe_open(path, framework="pt")
        return self._open.file


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as bytes to compare it by, so that NaN equals itself."""
    return as_bytes(tensor.contiguous())


def _entries(path: Path) -> dict[str, TensorEntry]:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: cannot be mapped
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None
    return {
        name: TensorEntry(path, tuple(part.get_shape()), part.get_dtype())
        for name, part in slices.items()
        if not name.endswith(_FREQUENCIES)
    }


_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_FREQUENCIES = ".rotary_emb.inv_freq"
"""Old Llama folders have them for every layer; they follow from config.json, and transformers ignores them too."""
