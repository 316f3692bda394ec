"""The configuration of a model whose folder is not on this machine: the one that was published under the folder's name."""

from __future__ import annotations

from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.errors import ModelError, did_you_mean
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.hf_config import ModelShape, model_shape, read_config

PUBLISHED = Path(__file__).parents[2] / "docs" / "models"
FP8_BYTES = 1.0
"""Bytes of a weight in an FP8 folder; its scales are one number for a block of 128 × 128."""


def folder_of(model: str) -> Path:
    """Return where a model's config.json is: in its own folder, else in the one of docs/models/ with its name, in any case.

    Raises:
        ModelError: it is in neither; names the published ones.
    """
    if (hf_side(model) / "config.json").is_file():
        return hf_side(model)
    shipped = {folder.name.lower(): folder for folder in sorted(PUBLISHED.iterdir())}
    name = Path(model).name.lower()
    if name not in shipped:
        raise ModelError(
            f"model.path: {model} has no config.json, and docs/models/ has none under {name}; it has {', '.join(shipped)}"
            f"{did_you_mean(name, shipped)}"
        )
    return shipped[name]


def planned_shape(config: Config) -> tuple[ModelShape, Path]:
    """Return the actor's shape, and the folder that it was read from.

    Raises:
        ModelError, ConfigError: as `model_shape`.
    """
    folder = folder_of(config.model.path)
    return model_shape(folder, config.model.overrides), folder


def engine_item_bytes(config: Config, trained: float) -> float:
    """Return the bytes of a layer's weight in the engine.

    Args:
        trained: bytes of a weight in the trainer; engines without a folder of their own have as many.

    Raises:
        ModelError: rollout.model is neither here nor published.
    """
    if not config.rollout.model:
        return trained
    return FP8_BYTES if read_config(folder_of(config.rollout.model)).get("quantization_config") else trained
