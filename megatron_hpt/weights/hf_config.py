"""What a Hugging Face model folder says about the model, checked; imports no torch.

Keys that change the computation and are not understood are refused here, before any weight is read: a model that
is built almost right trains and generates garbage without an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ModelError

SUPPORTED = ("llama", "mixtral")


@dataclass(frozen=True)
class ModelShape:
    """Sizes and constants of a decoder-only transformer, in Hugging Face's terms."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_positions: int
    experts: int = 0
    """Experts of a layer; 0: a dense model."""
    experts_per_token: int = 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read config.json of a model folder.

    Raises:
        ModelError: not a folder, no config.json, not JSON, not a model's configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(
            f"model.path: {folder} is not a folder; give a Hugging Face model folder (config.json, *.safetensors, tokenizer)"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model.path: {folder} has no config.json; it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file}: has no model_type; it is not a model's configuration")
    return config


def model_shape(folder: str | Path) -> ModelShape:
    """The shape of the model in `folder`.

    Raises:
        ModelError: not a model folder, an unsupported family, or a key that is not understood.
    """
    config = read_config(folder)
    file = Path(folder) / "config.json"
    _refuse_unsupported(config, file)
    heads = _need(config, "num_attention_heads", file)
    hidden = _need(config, "hidden_size", file)
    return ModelShape(
        family=config["model_type"],
        layers=_need(config, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=_need(config, "intermediate_size", file),
        vocab=_need(config, "vocab_size", file),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=_need(config, "max_position_embeddings", file),
        **_experts(config, file),
    )


def _experts(config: dict[str, Any], file: Path) -> dict[str, int]:
    if config["model_type"] != "mixtral":
        return {}
    return {
        "experts": _need(config, "num_local_experts", file),
        "experts_per_token": _need(config, "num_experts_per_tok", file),
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters: transformers 5 nests them in rope_parameters, older files use rope_scaling."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(config: dict[str, Any], file: Path) -> None:
    family = config["model_type"]
    if family not in SUPPORTED:
        raise ModelError(f"{file}: model_type {family!r} is not supported; supported: {', '.join(SUPPORTED)}")
    rope_type = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    refused = {
        "rope scaling": rope_type if rope_type != "default" else None,
        "quantization_config": config.get("quantization_config"),
        "attention_bias": config.get("attention_bias") or None,
        "mlp_bias": config.get("mlp_bias") or None,
        "hidden_act": config.get("hidden_act") if config.get("hidden_act", "silu") != "silu" else None,
        "sliding_window": config.get("sliding_window"),
    }
    for key, value in refused.items():
        if value is not None:
            raise ModelError(f"{file}: {key} = {value!r} changes the computation and is not supported yet")


def _need(config: dict[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{file}: {key} is {value!r}; expected a positive integer")
    return value
