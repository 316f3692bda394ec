"""Loading recipes: a Python file with ``recipe(…) -> Config`` and, optionally, ``prepare(config)``.

A recipe that stands for several runs has arguments with defaults (``recipe(size="7B", method="hpt")``), given on the command
line by their names among the settings: ``size=1.5B method=luffy trainer.steps=20``.
``prepare`` makes the inputs that the recipe names (data, a converted model) where they are missing; a recipe whose
inputs are the user's own files has none.
"""

from __future__ import annotations

import inspect
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError, validate_call

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError, HptError, did_you_mean
from megatron_hpt.overrides import apply_overrides, load_yaml, note_twice, with_files
from megatron_hpt.settings.sections import line_of


@dataclass(frozen=True)
class Recipe:
    """A configuration and the function that makes its missing inputs."""

    config: Config
    prepare: Callable[[Config], None] | None = None
    overrides: Sequence[str] = ()
    """What was given beside the recipe's own arguments."""


def load(source: str, given: Sequence[str]) -> Recipe:
    """Load a recipe file, a saved config.yaml, or a run directory that holds one, and apply what is given.

    Args:
        given: overrides of settings, and the recipe's own arguments, each ``name=value``; ``@FILE``: those of a YAML file.

    Raises:
        ConfigError: no such file, a file of another kind, a recipe that does not return a Config, a wrong argument.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{source}: no such recipe; give a recipe file (recipes/quickstart.py), a config.yaml, or a run directory"
        )
    given = with_files(given)
    if path.suffix in (".yaml", ".yml"):
        return Recipe(apply_overrides(load_yaml(path), given), overrides=given)
    if path.suffix != ".py":
        raise ConfigError(f"{source}: a recipe is a .py file or a saved .yaml configuration, not {path.suffix or 'this'}")
    recipe = _load_python(path, given)
    return Recipe(apply_overrides(recipe.config, list(recipe.overrides)), recipe.prepare, recipe.overrides)


def _load_python(path: Path, given: Sequence[str]) -> Recipe:
    try:
        names = runpy.run_path(str(path))
    except HptError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: the recipe could not be imported: {type(error).__name__}: {error}") from error
    function = names.get("recipe")
    if not callable(function):
        raise ConfigError(f"{path}: defines no function recipe(); a recipe file needs `def recipe() -> Config`")
    arguments, overrides = _arguments(function, given, path)
    try:
        config = validate_call(function)(**arguments)
    except ValidationError as error:
        lines = [line_of(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
        raise ConfigError(f"{path}: {error.title}: not valid\n  " + "\n  ".join(lines)) from None
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: recipe() returned {type(config).__name__}; it must return megatron_hpt.config.Config")
    return Recipe(config, names.get("prepare"), overrides)


def _arguments(function: Callable[..., Config], given: Sequence[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """The recipe's arguments among what is given, and the rest."""
    own = inspect.signature(function).parameters
    if clash := own.keys() & Config.model_fields.keys():
        raise ConfigError(f"{path}: recipe({', '.join(sorted(clash))}): a section has that name; call the argument another")
    arguments: dict[str, str] = {}
    overrides = []
    for text in given:
        key, equals, value = text.partition("=")
        if equals and key in own:
            if key in arguments:
                note_twice(key, f"{key}={value}", arguments[key])
            arguments[key] = value
        elif own and "." not in key and key not in Config.model_fields:
            hint = did_you_mean(key, [*own, *Config.model_fields])
            raise ConfigError(f"{text!r}: {path} has the arguments {', '.join(own)}; a setting is section.key=value{hint}")
        else:
            overrides.append(text)
    return arguments, overrides
