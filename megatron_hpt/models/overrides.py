"""What `model.overrides` makes of the contents of a config.json. Pure; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ConfigError, did_you_mean

_FIXED = {
    "model_type": "it says which model the weights are of",
    "architectures": "it says which model the weights are of",
    "auto_map": "it names code of the folder, which is never run",
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "quantization_config": "it belongs to the weights of a folder, e.g. of rollout.model",
}
"""Keys that cannot be overridden, and why."""
_ABSENT: dict[str, Any] = {
    "head_dim": 0,
    "norm_topk_prob": False,
    "num_key_value_heads": 0,
    "rms_norm_eps": 0.0,
    "rope_parameters": {},
    "rope_scaling": {},
    "rope_theta": 0.0,
    "sliding_window": 0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
"""Keys that are read although a config.json may leave them out, each with a value of its kind."""
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")


def overridden(config: Mapping[str, Any], overrides: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the contents of a config.json with other values for some keys.

    Where one of them is rotary, all three keys say the same afterwards: transformers 5 writes ``rope_parameters`` with the
    base in it, files and readers before it have ``rope_theta`` and, unless it is plain, ``rope_scaling``.

    Args:
        file: the config.json, for messages.

    Raises:
        ConfigError: the file does not have a key, a key cannot be overridden, or a value is of another kind.
    """
    for key, value in overrides.items():
        _check(key, value, config, file)
    changed = {**config, **overrides}
    return {**changed, **_rotary(config, overrides)} if overrides.keys() & set(_ROTARY) else changed


def _check(key: str, value: Any, config: Mapping[str, Any], file: Path) -> None:
    if key in _FIXED:
        raise ConfigError(f"model.overrides.{key}: cannot be overridden: {_FIXED[key]}")
    known = {**_ABSENT, **{name: there for name, there in config.items() if there is not None or name not in _ABSENT}}
    if key not in known:
        hint = did_you_mean(key, sorted(known.keys() - _FIXED.keys()), lambda name: f"model.overrides.{name}")
        raise ConfigError(f"model.overrides.{key}: {file} has no such key{hint}")
    wanted, kind = (_KINDS.get(type(v)) for v in (known[key], value))
    if wanted and kind and wanted != kind:
        raise ConfigError(f"model.overrides.{key}: given {value!r}; it is {wanted} in {file}")


def _rotary(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys of the rotary embedding, from what is overridden and, for the rest, what the file says."""
    before = config.get("rope_parameters") or config.get("rope_scaling") or {}
    replaced = [overrides[key] or {} for key in ("rope_parameters", "rope_scaling") if key in overrides]
    if len(replaced) > 1:
        raise ConfigError("model.overrides.rope_scaling: is the same as rope_parameters; give one of them")
    settings = replaced[0] if replaced else before
    base = _base((overrides, *replaced), (before, config))
    scaling = {key: value for key, value in settings.items() if key != "rope_theta"}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {
        **base,
        "rope_parameters": {"rope_type": kind, **scaling, **base},
        "rope_scaling": None if kind == "default" else scaling,
    }


def _base(given: tuple[Mapping[str, Any], ...], before: tuple[Mapping[str, Any], ...]) -> dict[str, float]:
    """Return ``rope_theta`` as given, else as it was; nothing where neither says it."""
    said = [source["rope_theta"] for source in given if "rope_theta" in source]
    for value in said:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"model.overrides.rope_theta: given {value!r}; it is a positive number")
    if len(set(said)) > 1:
        raise ConfigError(f"model.overrides.rope_theta: given {said[0]!r}, and {said[1]!r} inside another override")
    said += [source["rope_theta"] for source in before if source.get("rope_theta") is not None]
    return {"rope_theta": said[0]} if said else {}
