"""Functions of the user's own, named in a recipe as ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ConfigError


def import_object(path: str, key: str) -> Any:
    """Import what the user names; modules of the working directory are found too, as they are by ``python -m``.

    Raises:
        ConfigError: it cannot be imported; names the recipe's key.
    """
    module, _, name = path.rpartition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(_of_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        message = f"{type(error).__name__}: {error}; expected package.module:function or file.py:function"
        raise ConfigError(f"{key}: {path!r} cannot be imported: {message}") from error


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Import a function, as `import_object` does.

    Raises:
        ConfigError: it cannot be imported or called; names the recipe's key.
    """
    function = import_object(path, key)
    if not callable(function):
        raise ConfigError(f"{key}: {path!r} is a {type(function).__name__}, not a function")
    return function


def _of_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module
