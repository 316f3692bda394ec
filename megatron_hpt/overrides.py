"""Configurations from files and from ``key=value`` on command lines. Imports no torch."""

from __future__ import annotations

import functools
import logging
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.settings.sections import alternatives, annotation_of, is_section, unknown_key, validated_section
from megatron_hpt.settings.values import LONGEST, NotAValue, dump, given_text, given_value, parse, shown

logger = logging.getLogger(__name__)


def validated(tree: dict[str, Any], origin: str) -> Config:
    """Build a Config from plain data; every problem is one line with key, given value and what is allowed.

    Raises:
        ConfigError: naming `origin` (a file or "overrides") and each key.
    """
    return validated_section(Config, tree, origin)


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Return `config` with dotted ``key=value`` overrides applied and everything validated again.

    A setting that is a text (a path, a pattern, a template) is what stands behind the ``=``, to the last character, or what
    quotes around all of it hold. Others are YAML: ``3``, ``1e-3``, ``true``, ``null``, ``[0.9, 0.95]``, ``{a: b.parquet}``;
    what YAML would drop (a comment) is refused. A mapping for a section changes the keys that it has. ``@FILE`` stands for the
    settings in a YAML file (`with_files`). Of a key that is given twice the last counts, as where a script's own settings come
    before its user's; a note says so.

    Raises:
        ConfigError: an override without "=", an unknown key, a value of the wrong type, a file that cannot be read.
    """
    tree = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for override in with_files(overrides):
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {shown(override)}: expected section.key=value, e.g. trainer.steps=20")
        path = key.split(".")
        for changed, value in _settings(path, _given(path, text)):
            name = ".".join(changed)
            for before in [one for one in values if one == name or one.startswith(f"{name}.")]:
                note_twice(before, f"{name}={shown(value)}", shown(values.pop(before)))
            values[name] = value
            _set(tree, changed, value)
    return validated(tree, _overridden(overrides) if overrides else config.name)


def with_files(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which ``@FILE`` is replaced by the settings of that YAML file, each section a mapping.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping; names it.
    """
    settings: list[str] = []
    for override in overrides:
        if not override.startswith("@"):
            settings.append(override)
            continue
        path = Path(override[1:])
        tree = read_yaml(path)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
        settings += [f"{key}={value if isinstance(value, str) else dump(value, one_line=True)}" for key, value in tree.items()]
    return settings


def _overridden(overrides: list[str]) -> str:
    """What a message about overrides begins with."""
    text = " ".join(overrides)
    return f"overrides {text if len(text) <= LONGEST else text[:LONGEST] + ' …'}"


@functools.cache
def note_twice(name: str, last: str, before: str) -> None:
    """Said once a process: a command may read its settings several times."""
    logger.warning("note: %s is given twice; %s counts, being the last, and %s does not", name, last, before)


def reward_alone(overrides: list[str], **own: Any) -> RewardConfig:
    """The section `reward` of a configuration that has nothing else; raises as `apply_overrides`.

    Args:
        own: its settings where nothing overrides them.
    """
    nothing = Config(
        name="rewards", model=ModelConfig(path="none"), data=DataConfig(train="none"), algorithm=AlgorithmConfig(name="grpo")
    )
    nothing.reward = RewardConfig(**own)
    return apply_overrides(nothing, overrides).reward


def _given(path: list[str], text: str) -> Any:
    """What is given for a setting, read as its type asks.

    Raises:
        ConfigError: no such setting, or a text that YAML would cut or turn into something else.
    """
    if (annotation := annotation_of(Config, path)) is None:
        raise ConfigError(unknown_key(Config, path))
    kinds = list(alternatives(annotation))
    collections = any(typing.get_origin(kind) in (dict, list, tuple) for kind in kinds)
    if str in kinds and types.NoneType in kinds and text.strip() in ("", "~", "null"):
        return None
    if str in kinds and not (collections and text.lstrip().startswith(("[", "{"))):
        return given_text(text)
    try:
        return given_value(text)
    except NotAValue as error:
        raise ConfigError(f"{'.'.join(path)}: {error}") from None


def _settings(path: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    """A mapping that is given for a section as the settings that are in it; everything else as it is."""
    annotation = annotation_of(Config, path)
    if annotation is None:
        raise ConfigError(unknown_key(Config, path))
    if isinstance(value, dict) and is_section(annotation):
        for key, inner in value.items():
            yield from _settings([*path, key], inner)
    else:
        yield path, value


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = tree
    for depth, part in enumerate(path[:-1], 1):
        if isinstance(node, dict) and part not in node and is_section(annotation_of(Config, path[:depth])):
            node[part] = {}  # of a mapping from the user's own names to sections
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        above = ".".join(path[:-1])
        raise ConfigError(f"{'.'.join(path)}: {above} is no mapping of names so far; give all of it, {above}={{{path[-1]}: …}}")
    node[path[-1]] = value


def read_yaml(path: Path) -> Any:
    """What a YAML file says, unchecked.

    Raises:
        ConfigError: it cannot be read, or is not YAML; names the file.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (NotAValue, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a YAML file that can be read: {error}") from None


def load_yaml(path: Path) -> Config:
    """Read a saved configuration.

    Raises:
        ConfigError: not YAML, or not a valid configuration; names the file.
    """
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return validated(tree, str(path))


def dump_yaml(config: Config) -> str:
    """The whole tree with every default written out, in a form that `load_yaml` reads back equal."""
    return dump(config.model_dump(mode="json"))
