"""What a Hugging Face model folder says about the model, checked; imports no torch.

Keys that change the computation and are not understood are refused here, before any weight is read: a model that
is built almost right trains and generates garbage without an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.errors import ModelError
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.overrides import overridden


@dataclass(frozen=True)
class LinearScaling:
    """Rotary embedding of positions divided by `factor` (Position Interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary embedding of Llama 3.1 and later: only long waves are stretched (transformers, modeling_rope_utils.py)."""

    factor: float
    low_freq_factor: float
    """Waves longer than the original positions divided by it are stretched by `factor`."""
    high_freq_factor: float
    """Waves shorter than the original positions divided by it stay; between the two the stretching fades."""
    original_max_position_embeddings: int


RopeScaling = LinearScaling | Llama3Scaling
_SCALINGS: dict[str, type[RopeScaling] | None] = {"default": None, "linear": LinearScaling, "llama3": Llama3Scaling}
"""rope_type → class of its scaling; None: no scaling."""
_ROTARY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | {
    part.name for scaling in _SCALINGS.values() if scaling for part in fields(scaling)
}
"""Keys of rotary parameters that are understood, or ignored by every reader where the rope_type has no use for them."""


@dataclass(frozen=True)
class _Family:
    """A model_type, and how its config.json differs from Llama's."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    ffn: str = "intermediate_size"
    """Key of the inner size of the feed-forward network, or of one expert's."""
    experts: tuple[str, ...] = ()
    """Keys that may hold the number of experts; empty for a dense model."""
    has_norm_topk_prob: bool = False
    """Whether config.json says norm_topk_prob; in other mixtures of experts it is always true."""
    required: tuple[str, ...] = ()
    """Keys whose default in transformers is a number of its own, not one that follows from the other sizes."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values that transformers takes for absent keys, where they are not Llama's."""
    window_switch: str | None = None
    """Key without which sliding_window says nothing; None: there is no such key."""
    accepted: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the computation, with the values that do not (beside null and absence)."""


_QWEN3 = _Family(
    "Qwen3ForCausalLM",
    qk_norm=True,
    required=("head_dim", "num_key_value_heads"),
    window_switch="use_sliding_window",
    defaults={"sliding_window": 4096},
    accepted={"attention_bias": (False,), "qk_norm": (True,)},
)
_MIXTRAL = _Family(
    "MixtralForCausalLM",
    experts=("num_local_experts",),
    required=("num_key_value_heads",),
    defaults={"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    accepted={"router_jitter_noise": (0.0,)},
)
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", accepted={"attention_bias": (False,), "mlp_bias": (False,)}),
    "mistral": _Family("MistralForCausalLM", required=("num_key_value_heads",), defaults={"sliding_window": 4096}),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        required=("num_key_value_heads",),
        window_switch="use_sliding_window",
        defaults={"sliding_window": 4096},
        accepted={"qkv_bias": (True,)},
    ),
    "qwen3": _QWEN3,
    "mixtral": _MIXTRAL,
    "qwen3_moe": replace(
        _QWEN3,
        architecture="Qwen3MoeForCausalLM",
        ffn="moe_intermediate_size",
        experts=("num_experts", "num_local_experts"),  # published models have the first, transformers 5.19 writes the second
        has_norm_topk_prob=True,
        accepted={**_QWEN3.accepted, "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    ),
}
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_mrope": (False,),
    "auto_map": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "rope_interleaved": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "residual_multiplier": (1.0,),
    # Only the engines' code reads these: what they sample from would not be what is trained.
    "ada_rms_norm_t_cond": (False,),
    "bias": (False,),
    "dual_chunk_attention_config": (),
    "is_causal": (True,),
    "llama_4_scaling": (),
    "logit_scale": (1.0,),
    "original_num_attention_heads": (),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "rope_is_neox_style": (True,),
    "scale_emb": (1.0,),
    "shared_expert_intermediate_size": (0,),
    "target_hidden_size": (),
    "target_layer_count": (),
}
"""As `_Family.accepted`, for every family; also keys of other families, which other readers of the file heed."""
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
    """Inner size of a layer's feed-forward network, or of one expert's in a mixture of experts."""
    vocab: int
    tied_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_positions: int
    experts: int = 0
    """Number of experts of a layer; 0 for a dense model."""
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    """Whether the probabilities of a token's experts are divided by their sum."""
    qk_norm: bool = False
    """Whether queries and keys of every head are normalised (RMS) before the rotation, by weights that the heads share."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias; no other layer has one."""
    rope_scaling: RopeScaling | None = None

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that share one key/value head."""
        return self.heads // self.kv_heads


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read config.json of a model folder, with other values for some keys (`model.overrides`).

    Raises:
        ModelError: there is no such folder, it has no config.json, or that is not JSON or not a model's configuration.
        ConfigError: a key that cannot be overridden.
    """
    folder = hf_side(folder)
    if not folder.is_dir():
        raise ModelError(
            f"model.path: {folder} is not a folder; give a Hugging Face model folder (config.json, *.safetensors, tokenizer) "
            "or a checkpoint (tools/convert_hf.py to-megatron)"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model.path: {folder} has no config.json; it is not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{file}: has no model_type; it is not a model's configuration")
    return overridden(config, overrides or {}, file)


def run_shape(config: Config, folder: str | None = None) -> ModelShape:
    """Return the shape of a run's actor, or of the model that its KL refers to; `model.overrides` are for the actor's alone.

    Raises:
        ModelError, ConfigError: as `model_shape`.
    """
    actor, model = Path(config.model.path), Path(folder or config.model.path)
    return model_shape(model, config.model.overrides if model.resolve() == actor.resolve() else None)


def model_shape(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """Return the shape of the model in `folder`.

    Raises:
        ModelError: it is not a model folder, its family is unsupported, or a key is not understood.
        ConfigError: a key cannot be overridden.
    """
    config = read_config(folder, overrides)
    file = hf_side(folder) / "config.json"
    with _kinds_of_values(file):
        family = _family(config, file)
        _refuse_unsupported(config, family, file)
        shape = _shape(config, file)
        _refuse_rotary(config, file)
        _refuse_window(config, family, shape.max_positions, file)
        return shape


def shape_of_any(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """Return the shape of a model that need not be trainable here, as long as its tensors and their cuts are known.

    Raises:
        ModelError: not a model folder, an unsupported family or rotary embedding, a missing size, or sizes that contradict
            each other.
        ConfigError: a key that cannot be overridden.
    """
    file = hf_side(folder) / "config.json"
    with _kinds_of_values(file):
        return _shape(read_config(folder, overrides), file)


@contextmanager
def _kinds_of_values(file: Path) -> Iterator[None]:
    """Blame the file for a value of another kind than its key has, such as a text in place of a mapping."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: a value is of another kind than its key has: {error}") from error


def _shape(config: dict[str, Any], file: Path) -> ModelShape:
    family = _family(config, file)
    for key in family.required:
        _need(config, key, file)
    heads, hidden = _need(config, "num_attention_heads", file), _need(config, "hidden_size", file)
    rope = _rope(config)
    shape = ModelShape(
        family=config["model_type"],
        layers=_need(config, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=heads if config.get("num_key_value_heads") is None else _need(config, "num_key_value_heads", file),
        head_dim=hidden // heads if config.get("head_dim") is None else _need(config, "head_dim", file),
        ffn=_need(config, family.ffn, file),
        vocab=_need(config, "vocab_size", file),
        tied_embeddings=_flag(config, "tie_word_embeddings", file),
        rope_theta=_positive(rope.get("rope_theta") or _value(config, "rope_theta", family, 10000.0), "rope_theta", file),
        rope_scaling=_scaling(rope, file),
        norm_eps=_positive(_value(config, "rms_norm_eps", family, 1e-6), "rms_norm_eps", file),
        max_positions=_need(config, "max_position_embeddings", file),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        **(_experts(config, family, file) if family.experts else {}),
    )
    _check_heads(shape, config, file)
    return shape


def _check_heads(shape: ModelShape, config: dict[str, Any], file: Path) -> None:
    """Check that heads divide the hidden size where head_dim is not given, groups divide the heads, and head_dim is even."""
    rules = {
        f"num_attention_heads = {shape.heads} does not divide hidden_size = {shape.hidden}, and there is no head_dim": (
            bool(config.get("head_dim")) or shape.hidden % shape.heads == 0
        ),
        f"num_key_value_heads = {shape.kv_heads} does not divide num_attention_heads = {shape.heads}": (
            shape.heads % shape.kv_heads == 0
        ),
        f"head_dim = {shape.head_dim} is odd: a rotary embedding turns pairs": shape.head_dim % 2 == 0,
    }
    for wrong, holds in rules.items():
        if not holds:
            raise ModelError(f"{file}: {wrong}")


def _family(config: dict[str, Any], file: Path) -> _Family:
    if config["model_type"] not in SUPPORTED:
        raise ModelError(f"{file}: model_type {config['model_type']!r} is not supported; supported: {', '.join(SUPPORTED)}")
    family = _FAMILIES[config["model_type"]]
    named = config.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        raise ModelError(
            f"{file}: architectures = {named!r}; only {family.architecture} of {config['model_type']} is supported"
        )
    return family


def _value(config: dict[str, Any], key: str, family: _Family, default: Any) -> Any:
    """Return the value of a key, or what transformers takes where it is absent."""
    value = config.get(key)
    return family.defaults.get(key, default) if value is None else value


def _experts(config: dict[str, Any], family: _Family, file: Path) -> dict[str, Any]:
    given = {key: config[key] for key in family.experts if config.get(key) is not None}
    if len(set(map(str, given.values()))) > 1:
        raise ModelError(f"{file}: {' and '.join(f'{key} = {value!r}' for key, value in given.items())} contradict each other")
    experts = _need(config, next(iter(given), family.experts[0]), file)
    chosen = _need(config, "num_experts_per_tok", file)
    norm = _flag(config, "norm_topk_prob", file) if family.has_norm_topk_prob else True
    if chosen > experts:
        raise ModelError(f"{file}: num_experts_per_tok is {chosen}; there are only {experts} experts")
    if chosen == 1 and norm:
        raise ModelError(
            f"{file}: num_experts_per_tok = 1 with normalised probabilities gives the only expert probability 1 and the router "
            "no gradient; it is not supported"
        )
    return {"experts": experts, "experts_per_token": chosen, "norm_topk_prob": norm}


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters: transformers 5 writes rope_parameters, but takes rope_scaling where a file has both."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: dict[str, Any], file: Path) -> RopeScaling | None:
    kind = _rope_type(rope)
    if kind not in _SCALINGS:
        raise ModelError(
            f"{file}: rope_type = {kind!r} changes the computation and is not supported; supported: {', '.join(_SCALINGS)}"
        )
    scaling = _SCALINGS[kind]
    if scaling is None:
        return None
    for name in (known := [part.name for part in fields(scaling)]):
        _positive(rope.get(name), f"{name} of rope_type {kind!r}", file)
    found = scaling(**{name: rope[name] for name in known})
    if isinstance(found, Llama3Scaling) and found.low_freq_factor >= found.high_freq_factor:
        raise ModelError(
            f"{file}: low_freq_factor = {found.low_freq_factor} of rope_type 'llama3' must be below high_freq_factor = "
            f"{found.high_freq_factor}"
        )
    return found


def _refuse_unsupported(config: dict[str, Any], family: _Family, file: Path) -> None:
    values = {
        **config,
        "partial_rotary_factor": _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor")),
        # Remote code: only what is loaded for a causal language model would compute something else.
        "auto_map": {k: v for k, v in (config.get("auto_map") or {}).items() if k.startswith("AutoModel")} or None,
    }
    for key, accepted in (_ACCEPTED | family.accepted).items():
        value = values.get(key)
        if value is not None and value not in accepted:
            raise ModelError(f"{file}: {key} = {value!r} changes the computation and is not supported yet")


def _refuse_rotary(config: dict[str, Any], file: Path) -> None:
    """Refuse rotary parameters that are not understood, or that readers of the file would understand differently."""
    rope = _rope(config)
    if None not in (kinds := (rope.get("rope_type"), rope.get("type"))) and kinds[0] != kinds[1]:
        raise ModelError(f"{file}: rope_type = {kinds[0]!r} and type = {kinds[1]!r} contradict each other")
    for key in sorted(rope.keys() - _ROTARY):
        if rope[key] is not None:
            raise ModelError(
                f"{file}: {key} = {rope[key]!r} of the rotary embedding changes the computation and is not supported; "
                f"understood: {', '.join(sorted(_ROTARY))}"
            )
    places = ("rope_parameters", "rope_scaling")
    said = [_spelled_out(config[key], config.get("rope_theta")) for key in places if config.get(key)]
    if said[1:] and said[0] != said[1]:
        raise ModelError(f"{file}: {' and '.join(f'{key} = {config[key]!r}' for key in places)} contradict each other")
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        outer, inner = config.get(key), rope.get(key)
        if None not in (outer, inner) and outer != inner:
            raise ModelError(f"{file}: {key} = {outer!r} contradicts that of the rotary parameters, {inner!r}")


def _spelled_out(rope: dict[str, Any], theta: Any) -> dict[str, Any]:
    """Return rotary parameters in one spelling."""
    said = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return {"rope_theta": theta, **said, "rope_type": _rope_type(rope)}


def _refuse_window(config: dict[str, Any], family: _Family, positions: int, file: Path) -> None:
    """Refuse a sliding window of attention, unless no sequence can be longer than it."""
    switched_off = family.window_switch is not None and not config.get(family.window_switch)
    # An explicit null is no window; an absent key is what transformers makes of it.
    window = config["sliding_window"] if "sliding_window" in config else family.defaults.get("sliding_window")
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if not switched_off and window is not None:
        if window < positions:
            raise ModelError(
                f"{file}: sliding_window = {window!r} is below max_position_embeddings = {positions}: it changes the "
                f"computation and is not supported; with model.overrides.max_position_embeddings={window} or less it changes "
                "nothing"
            )
        kinds -= {"sliding_attention"}
    if kinds:
        raise ModelError(f"{file}: layer_types = {sorted(kinds)!r} changes the computation and is not supported yet")


_MOST, _MOST_LAYERS = 2**31, 10_000
"""Largest size in config.json, and largest number of layers, whose tensors are named one by one."""


def _need(config: dict[str, Any], key: str, file: Path) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(f"{file}: {key} is {value!r}; expected a positive integer")
    most = _MOST_LAYERS if key == "num_hidden_layers" else _MOST
    if value > most:
        raise ModelError(f"{file}: {key} is {value}; at most {most}")
    return value


def _flag(config: dict[str, Any], key: str, file: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{file}: {key} is {value!r}; expected true or false")
    return bool(value)


def _positive(value: Any, what: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"{file}: {what} is {value!r}; expected a positive number")
    return float(value)
