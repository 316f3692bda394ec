"""The engines that a recipe may name: how each is started and asked. How weights reach them: `weights.control.CONTROLS`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_hpt.config import Config
from megatron_hpt.data.files import write_private
from megatron_hpt.errors import ConfigError
from megatron_hpt.process import token
from megatron_hpt.rollout import sglang, vllm
from megatron_hpt.rollout.engine import Weights
from megatron_hpt.rollout.http import CONNECTIONS, HttpEngine
from megatron_hpt.weights.control import CONTROLS, EngineControl, InFlight
from megatron_hpt.weights.hf_config import ModelShape, read_config, run_shape
from megatron_hpt.weights.layouts import EngineLayout
from megatron_hpt.weights.sender import Options
from megatron_hpt.weights.wire import fp8_format

SGLANG_ENVIRONMENT = ".venv-sglang"
"""What `make sglang-env` builds, beside the environment of the trainer."""


class Client(Protocol):
    """Makes the client of a server."""

    def __call__(self, config: Config, url: str, own: str | None = None) -> HttpEngine:
        """
        Args:
            own: label of the weights that the server was started with, where they count (`HttpEngine`).
        """


@dataclass(frozen=True)
class Start:
    """One server that is to be started."""

    model: str
    """Folder of its model."""
    port: int
    folder: Path
    """For private files."""
    on_gpus: bool
    """On GPUs; else on the host."""
    weights: Weights = Weights.NONE
    """What it has before anything is sent to it."""


@dataclass(frozen=True)
class Kind:
    """One inference server."""

    python: Callable[[], str]
    """Interpreter of its environment where the recipe names none."""
    command: Callable[[Config, str, Start], list[str]]
    """(config, interpreter, start) → command line."""
    environment: Callable[[Config, bool], dict[str, str]]
    """(config, on GPUs) → environment, on top of this process's."""
    client: Client
    install: str
    """What to do when the interpreter is missing."""
    host_head_dims: tuple[int, ...] = ()
    """Head sizes that its attention has without a GPU; none: any."""


def _vllm_command(config: Config, python: str, start: Start) -> list[str]:
    return vllm.server_command(config, python, start.model, start.port, on_gpus=start.on_gpus, weights=start.weights)


def _sglang_command(config: Config, python: str, start: Start) -> list[str]:
    """The token goes by a private file: a command line can be read by every user of the machine."""
    host_cache = None if start.on_gpus else cache_tokens(config)
    command = sglang.server_command(config, python, start.model, start.port, host_cache, start.weights)
    if own := token():
        file = start.folder / f"sglang_{start.port}.yaml"
        write_private(file, f"api-key: {own}\n")
        command += ["--config", str(file)]
    return command


def _vllm_client(config: Config, url: str, own: str | None = None) -> HttpEngine:
    return vllm.VllmEngine(url, config.deadlines.rollout_s, config.deadlines.silent_s, _connections(config), own)


def _sglang_client(config: Config, url: str, own: str | None = None) -> HttpEngine:
    vocab, deadlines = run_shape(config).vocab, config.deadlines
    return sglang.SglangEngine(url, deadlines.rollout_s, deadlines.silent_s, vocab, _connections(config), own)


def _connections(config: Config) -> int:
    return max(CONNECTIONS, config.rollout.max_running)


def cache_room(config: Config, shape: ModelShape) -> int:
    """Tokens for which `rollout.kv_cache_gib` has room."""
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    heads = max(1, shape.kv_heads // config.rollout.tensor_parallel)  # of one rank; more ranks than heads share them
    return config.rollout.kv_cache_gib * 2**30 // (2 * shape.layers * heads * shape.head_dim * element)


def cache_tokens(config: Config) -> int:
    """`cache_room`, and not more than can be in use."""
    most = config.rollout.max_running * (config.max_sequence_length + sglang.SPARE)
    return min(cache_room(config, run_shape(config)), most)


ENGINES: dict[str, Kind] = {
    "vllm": Kind(
        python=lambda: sys.executable,
        command=_vllm_command,
        environment=vllm.server_environment,
        client=_vllm_client,
        install="make .venv/.ready",
        host_head_dims=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),  # v1/attention/backends/cpu_attn.py
    ),
    "sglang": Kind(
        python=lambda: str(Path(sys.prefix).parent / SGLANG_ENVIRONMENT / "bin" / "python"),
        command=_sglang_command,
        environment=sglang.server_environment,
        client=_sglang_client,
        install="make sglang-env",
    ),
}
"""`rollout.engine` → the server."""


def interpreter(config: Config) -> str:
    """The interpreter of the engine's environment.

    Raises:
        ConfigError: there is none.
    """
    kind = ENGINES[config.rollout.engine]
    python = config.rollout.python or kind.python()
    if shutil.which(python) is None:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: no Python interpreter at {python}; run `{kind.install}` in the checkout, "
            "or set rollout.python to the interpreter of an environment that has it"
        )
    return python


def layout(config: Config) -> EngineLayout:
    """The layout of every engine of a run."""
    return EngineLayout(config.rollout.tensor_parallel)


def transfer_options(config: Config) -> Options:
    """How a run's weights travel."""
    transfer = config.transfer
    return Options(
        transport=transfer.transport,
        compare_every=transfer.compare_every,
        deadline_s=config.deadlines.transfer_s,
        host=transfer.host,
        folder=transfer.folder,
        full_every=transfer.full_every,
        fp8=fp8_format(read_config(config.engine_model)),
        sleep=config.rollout.sleep,
    )


def control(config: Config, url: str) -> EngineControl:
    """The control plane of one engine of a run."""
    return CONTROLS[config.rollout.engine](url, config.deadlines.transfer_s, InFlight(config.transfer.in_flight))
