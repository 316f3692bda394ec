"""The table of engines, and the engine that a recipe names."""

from __future__ import annotations

import shutil

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import EngineKind
from megatron_hpt.engines.sglang.server import SGLANG
from megatron_hpt.engines.vllm.server import VLLM
from megatron_hpt.errors import ConfigError, TransferError, did_you_mean
from megatron_hpt.settings.user_functions import import_object
from megatron_hpt.transfer.control import EngineControl, InFlight
from megatron_hpt.transfer.layouts import EngineLayout

ENGINES: dict[str, EngineKind] = {kind.name: kind for kind in (VLLM, SGLANG)}
"""`EngineKind.name` → engine; a new engine is a row here, or an EngineKind elsewhere (`kind_of`)."""


def kind_of(name: str) -> EngineKind:
    """Return the engine of a name, or of a path ``package.module:NAME`` to an EngineKind outside this package.

    Raises:
        ConfigError: there is no such engine; names those that there are.
    """
    if name in ENGINES:
        return ENGINES[name]
    if ":" not in name:
        allowed = f"{', '.join(ENGINES)}, or package.module:NAME of an EngineKind"
        raise ConfigError(f"rollout.engine: given {name!r}; allowed: {allowed}{did_you_mean(name, ENGINES)}")
    kind = import_object(name, "rollout.engine")
    if not isinstance(kind, EngineKind):
        raise ConfigError(
            f"rollout.engine: {name!r} is a {type(kind).__name__}, not a megatron_hpt.engines.interface.EngineKind"
        )
    return kind


def engine_of(config: Config) -> EngineKind:
    """Return the engine that `rollout.engine` names. Raises as `kind_of` does."""
    return kind_of(config.rollout.engine)


def interpreter(config: Config) -> str:
    """Return the interpreter of the engine's environment: `rollout.python`, or the engine's own.

    Raises:
        ConfigError: there is no such file; says how to build the environment.
    """
    kind = engine_of(config)
    python = config.rollout.python or kind.python()
    if shutil.which(python) is None:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: no Python interpreter at {python}; run `{kind.install}` in the checkout, "
            "or set rollout.python to the interpreter of an environment that has it"
        )
    return python


def layout(config: Config) -> EngineLayout:
    """Return how each server of a run shares its model out among its ranks."""
    return EngineLayout(config.rollout.tensor_parallel)


def control(config: Config, url: str) -> EngineControl:
    """Return the control plane of one server of a run."""
    return engine_of(config).control(url, config.deadlines.transfer_s, InFlight(config.transfer.in_flight))


def connect(url: str, deadline_s: float) -> EngineControl:
    """Return the control plane of a running server, whichever engine of the table it is; for tools that are given a URL alone.

    Raises:
        EngineGone: nobody answers there.
        TransferError: the server is of none of these engines.
    """
    for control in (kind.control(url, deadline_s, InFlight.RECOMPUTE) for kind in ENGINES.values()):
        try:
            control.version()
        except TransferError:
            continue
        return control
    raise TransferError(f"{url} is neither a vLLM server in development mode nor an SGLang server, or wants another token")
