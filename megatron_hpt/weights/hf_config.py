"""What a Hugging Face model folder says about the model, checked; imports no torch.

Keys that change the computation and are not understood are refused here, before any weight is read: a model that
is built almost right trains and generates garbage without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.errors import ModelError
from megatron_hpt.weights.overrides import overridden


@dataclass(frozen=True)
class _Family:
    """What a model_type is, and where its config.json differs from Llama's."""

    qk_norm: bool = False
    ffn: str = "intermediate_size"
    """Key of the inner size of a feed-forward network, of one expert's where there are experts."""
    experts: tuple[str, ...] = ()
    """Keys that may hold the number of experts; none: a dense model."""
    has_norm_topk_prob: bool = False
    """config.json says norm_topk_prob; elsewhere it is true of every mixture of experts."""
    required: tuple[str, ...] = ()
    """Keys whose default in transformers is a number of its own, not one that follows from the other sizes."""
    accepted: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the computation, with the values that do not (beside null and absence)."""


_QWEN3 = _Family(
    qk_norm=True,
    required=("head_dim", "num_key_value_heads"),
    accepted={"use_sliding_window": (False,), "layer_types": ()},  # sliding_window alone says nothing here
)
_FAMILIES = {
    "llama": _Family(accepted={"sliding_window": ()}),
    "mixtral": _Family(experts=("num_local_experts",), accepted={"sliding_window": ()}),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(
        _QWEN3,
        ffn="moe_intermediate_size",
        experts=("num_experts", "num_local_experts"),  # published models have the first, transformers 5.19 writes the second
        has_norm_topk_prob=True,
        accepted={**_QWEN3.accepted, "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    ),
}
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "rope scaling": ("default",),
    "quantization_config": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
}
"""As `_Family.accepted`, of every family."""
SUPPORTED = tuple(_FAMILIES)


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
    """Inner size of a layer's feed-forward network; of one expert's in a mixture of experts."""
    vocab: int
    tied_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_positions: int
    experts: int = 0
    """Experts of a layer; 0: a dense model."""
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    """The probabilities of a token's experts are divided by their sum."""
    qk_norm: bool = False
    """Queries and keys of every head are normalised (RMS) before the rotation, by weights that the heads share."""

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read config.json of a model folder, with other values for some keys (`model.overrides`).

    Raises:
        ModelError: not a folder, no config.json, not JSON, not a model's configuration.
        ConfigError: a key that cannot be overridden.
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
    return overridden(config, overrides or {}, file)


def run_shape(config: Config, folder: str | None = None) -> ModelShape:
    """The shape of a run's actor, or of the model that its KL refers to: `model.overrides` are of the actor's folder alone.

    Raises:
        ModelError, ConfigError: as `model_shape`.
    """
    own, model = Path(config.model.path), Path(folder or config.model.path)
    return model_shape(model, config.model.overrides if model.resolve() == own.resolve() else None)


def model_shape(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape of the model in `folder`.

    Raises:
        ModelError: not a model folder, an unsupported family, or a key that is not understood.
        ConfigError: a key that cannot be overridden.
    """
    config = read_config(folder, overrides)
    file = Path(folder) / "config.json"
    _refuse_unsupported(config, _family(config, file), file)
    return _shape(config, file)


def shape_of_any(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """The shape of a model that need not be trainable here: its tensors and how they are cut are known all the same.

    Raises:
        ModelError: not a model folder, an unsupported family, or a missing size.
        ConfigError: a key that cannot be overridden.
    """
    return _shape(read_config(folder, overrides), Path(folder) / "config.json")


def _shape(config: dict[str, Any], file: Path) -> ModelShape:
    family = _family(config, file)
    for key in family.required:
        _need(config, key, file)
    heads = _need(config, "num_attention_heads", file)
    hidden = _need(config, "hidden_size", file)
    return ModelShape(
        family=config["model_type"],
        layers=_need(config, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=_need(config, family.ffn, file),
        vocab=_need(config, "vocab_size", file),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_positions=_need(config, "max_position_embeddings", file),
        qk_norm=family.qk_norm,
        **(_experts(config, family, file) if family.experts else {}),
    )


def _family(config: dict[str, Any], file: Path) -> _Family:
    if config["model_type"] not in SUPPORTED:
        raise ModelError(f"{file}: model_type {config['model_type']!r} is not supported; supported: {', '.join(SUPPORTED)}")
    return _FAMILIES[config["model_type"]]


def _experts(config: dict[str, Any], family: _Family, file: Path) -> dict[str, Any]:
    given = {key: config[key] for key in family.experts if config.get(key) is not None}
    if len(set(map(str, given.values()))) > 1:
        raise ModelError(f"{file}: {' and '.join(f'{key} = {value!r}' for key, value in given.items())} contradict each other")
    experts = _need(config, next(iter(given), family.experts[0]), file)
    chosen = _need(config, "num_experts_per_tok", file)
    norm = bool(config.get("norm_topk_prob", False)) if family.has_norm_topk_prob else True
    if chosen > experts:
        raise ModelError(f"{file}: num_experts_per_tok is {chosen}; there are only {experts} experts")
    if chosen == 1 and norm:
        raise ModelError(
            f"{file}: num_experts_per_tok = 1 with normalised probabilities gives the only expert probability 1 and the router "
            "no gradient; it is not supported"
        )
    return {"experts": experts, "experts_per_token": chosen, "norm_topk_prob": norm}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters: transformers 5 nests them in rope_parameters, older files use rope_scaling."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(config: dict[str, Any], family: _Family, file: Path) -> None:
    values = {
        **config,
        "rope scaling": _rope(config).get("rope_type", _rope(config).get("type", "default")),
        "layer_types": sorted(set(config.get("layer_types") or ()) - {"full_attention"}) or None,
    }
    for key, accepted in (_ACCEPTED | family.accepted).items():
        value = values.get(key)
        if value is not None and value not in accepted:
            raise ModelError(f"{file}: {key} = {value!r} changes the computation and is not supported yet")


def _need(config: dict[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{file}: {key} is {value!r}; expected a positive integer")
    return value
