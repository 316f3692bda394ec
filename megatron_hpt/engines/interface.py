"""What an engine has to provide, who asks for it and when: the contract behind ``rollout.engine``.

An engine is a folder beside this module and one row of `registry.ENGINES`, or an `EngineKind` anywhere else, which a recipe
names as ``rollout.engine=package.module:NAME`` (a whole one: tests/engines/recorded_engine.py). This module, and whatever
makes an `EngineKind`, imports neither torch nor an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx

from megatron_hpt.config import Config
from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.types import Weights

if TYPE_CHECKING:
    from megatron_hpt.transfer.control import EngineControl, InFlight


@dataclass(frozen=True)
class Start:
    """One server that is to be started."""

    model: str
    """Hugging Face folder of its model."""
    port: int
    """Port to listen on, at `rollout.host`."""
    folder: Path
    """Folder in which the engine may write private files of this server."""
    on_gpus: bool
    """Whether the server computes on GPUs; otherwise it computes on the host."""
    weights: Weights = Weights.NONE
    """Weights that the server has before anything is sent to it."""


@dataclass(frozen=True)
class RunningServer:
    """A server that somebody else has started, as it describes itself (`megatron-hpt evaluate http://…`)."""

    url: str
    kind: str
    """`EngineKind.name` of its engine."""
    served: str
    """Name under which the server offers its model."""
    model: str
    """Folder or hub id that the server was started with."""
    label: str
    """Label that the server gives its weights."""
    context: int | None
    """Largest number of tokens of a prompt and its response together; None where the server does not say."""
    client: Callable[[int, float, float], HttpEngine]
    """(vocabulary size, `deadlines.rollout_s`, `deadlines.silent_s`) → a client that accepts samples of weights with this
    `label` only. Called by evaluations, once for each server."""


@dataclass(frozen=True)
class SamplingLimits:
    """The requests that a server refuses or answers differently than asked; `engines.checks` refuses them before a start."""

    coldest: float
    """Lowest temperature that the server samples at: below it takes another temperature, or the most likely token."""
    hottest: float | None = None
    """Highest temperature that the server accepts; None means any."""
    samples_are_one_request: bool = False
    """Whether all samples of a prompt are one request, which the server refuses if it has more than `rollout.max_running`."""


class MakeClient(Protocol):
    """The type of `EngineKind.client`."""

    def __call__(self, config: Config, url: str, own: str | None = None) -> HttpEngine:
        """Return a client of one server of a run. It opens no connection before its first request.

        Args:
            own: label of the weights that the server was started with, where samples of them count (see `HttpEngine`); None
                in a run, whose trainer sends the weights.
        """


@dataclass(frozen=True)
class EngineKind:
    """One kind of inference server: how it is started, asked for samples, given weights and recognised.

    Its server answers ``GET /health`` with status 200 once it can be asked for samples (`running.is_healthy`).
    """

    name: str
    """The engine's name in ``rollout.engine`` and in messages."""
    title: str
    """The engine's name as its own project writes it; a line of `megatron-hpt doctor`."""
    packages: tuple[str, ...]
    """Distributions of which one has to be installed in the engine's environment; `megatron-hpt doctor` looks for them."""
    plugin_group: str
    """Group of entry points by which the engine finds our receiver of weights; `megatron-hpt doctor` looks for ours in it."""
    install: str
    """Command that builds the engine's environment; messages name it where that is missing."""
    python: Callable[[], str]
    """Returns the interpreter of the engine's environment. Called before a start and by `megatron-hpt doctor`; a recipe's
    ``rollout.python`` goes before it. It may name a file that is not there: `registry.interpreter` then says so."""
    command: Callable[[Config, str, Start], list[str]]
    """(configuration, interpreter, start) → command line of one server, with `rollout.extra_arguments`. Called once for each
    server by whoever starts it, by `launch.engine_arguments`, and by a Slurm job that only shows its plan, where the model's
    folder may not be. A server that is started again gets the same one."""
    environment: Callable[[Config, bool], dict[str, str]]
    """(configuration, whether on GPUs) → the server's whole environment, inherited variables included
    (`environment.inherited_here`). Called where `command` is; launchers add TMPDIR and CUDA_VISIBLE_DEVICES."""
    argument_check: str
    """Python code that parses ``sys.argv[4:]`` as the server does, and raises what the server would. `megatron-hpt check` runs
    it with the engine's interpreter, and so does a run or an evaluation with `rollout.extra_arguments` before it starts
    anything: ``-c``, this code, and then the whole command line."""
    client: MakeClient
    """Called once for each server, by the coordinator and by evaluations."""
    control: Callable[[str, float, InFlight], EngineControl]
    """(URL, `deadlines.transfer_s`, `transfer.in_flight`) → the control plane of a server's weight updates. Called once for
    each server on every trainer rank; only the first rank calls the control's methods, from one thread a server. Opens no
    connection."""
    recognise: Callable[[str, httpx.Client], RunningServer | None]
    """(URL, connection to it) → a description of the server, or None if it is of another kind. Called by evaluations for a URL
    that a user names, for one kind after the other. May raise EngineError where the server refuses to answer, httpx.HTTPError
    where it cannot be reached, and LookupError, TypeError or ValueError where an answer cannot be read."""
    limits: SamplingLimits
    """Requests that `engines.checks` refuses before anything starts."""
    workspace_bytes: Callable[[float], float]
    """(bytes of a GPU's memory that the server may have: `rollout.gpu_memory_share`) → bytes of them that are neither weights
    nor cache. Called by `megatron-hpt plan`, and before a run whose engines are on the trainer's GPUs."""
    reserved_arguments: Mapping[str, str] = field(default_factory=dict)
    """Options that `rollout.extra_arguments` may not have, beside those of `command`, → why: other names of these, and options
    that a run cannot follow."""
    loads_fp8_per_tensor: bool = True
    """Whether a server that was started from an FP8 checkpoint with a scale for each tensor can be sent other weights."""
    host_head_dims: tuple[int, ...] = ()
    """Head sizes that the engine's attention supports without a GPU; empty means any."""
    started_with: str = "default"
    """Label that a server gives the weights of the folder that it was started with; evaluations take samples of these only."""
