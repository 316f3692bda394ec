"""Safetensors of a Hugging Face folder, read lazily by name and checked against the configuration."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hpt.errors import ModelError
from megatron_hpt.weights.hf_config import ModelShape
from megatron_hpt.weights.mapping import hf_tensor_shapes


class HfTensors:
    """The tensors of one folder."""

    def __init__(self, folder: str | Path) -> None:
        """Open the folder's files (their headers only).

        Raises:
            ModelError: no safetensors files, or a damaged one.
        """
        self._folder = Path(folder)
        paths = sorted(self._folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"model.path: {folder} has no *.safetensors files")
        self._files: dict[str, safe_open] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: not a whole safetensors file: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)

    def get(self, name: str) -> Tensor:
        """One tensor of a folder that has passed `check`."""
        return self._files[name].get_tensor(name)

    def check(self, shape: ModelShape) -> None:
        """Every tensor of the model is there with its shape, and no other.

        Raises:
            ModelError: names the tensors.
        """
        expected = hf_tensor_shapes(shape)
        missing, extra = expected.keys() - self._files.keys(), self._files.keys() - expected.keys()
        if missing or extra:
            raise ModelError(
                f"model.path: {self._folder}: missing tensors {sorted(missing)[:3]}, unexpected tensors {sorted(extra)[:3]}"
            )
        for name, size in expected.items():
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != size:
                raise ModelError(f"model.path: {self._folder}: {name} has shape {found}, config.json implies {size}")
