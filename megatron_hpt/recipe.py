"""Loading recipes: a Python file with ``recipe() -> Config`` and, optionally, ``prepare(config)``.

``prepare`` makes the inputs that the recipe names (data, a converted model) where they are missing; a recipe whose
inputs are the user's own files has none.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.config import Config, apply_overrides, load_yaml
from megatron_hpt.errors import ConfigError, HptError


@dataclass(frozen=True)
class Recipe:
    """A configuration and the function that makes its missing inputs."""

    config: Config
    prepare: Callable[[Config], None] | None = None


def load(source: str, overrides: list[str]) -> Recipe:
    """Load a recipe file, a saved config.yaml, or a run directory that holds one, and apply overrides.

    Raises:
        ConfigError: no such file, a file of another kind, a recipe that does not return a Config.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{source}: no such recipe; give a recipe file (recipes/quickstart.py), a config.yaml, or a run directory"
        )
    if path.suffix in (".yaml", ".yml"):
        return Recipe(apply_overrides(load_yaml(path), overrides))
    if path.suffix != ".py":
        raise ConfigError(f"{source}: a recipe is a .py file or a saved .yaml configuration, not {path.suffix or 'this'}")
    recipe = _load_python(path)
    return Recipe(apply_overrides(recipe.config, overrides), recipe.prepare)


def _load_python(path: Path) -> Recipe:
    try:
        names = runpy.run_path(str(path))
    except HptError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}: the recipe could not be imported: {type(error).__name__}: {error}") from error
    function = names.get("recipe")
    if not callable(function):
        raise ConfigError(f"{path}: defines no function recipe(); a recipe file needs `def recipe() -> Config`")
    config = function()
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: recipe() returned {type(config).__name__}; it must return megatron_hpt.config.Config")
    return Recipe(config, names.get("prepare"))
