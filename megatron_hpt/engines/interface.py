"""What an engine has to provide, who asks for it and when: the contract behind ``rollout.engine``.

An engine is a folder beside this module and one row of `registry.ENGINES`; or an `EngineKind` anywhere else, which a recipe
names as ``rollout.engine=package.module:NAME``. Imports neither torch nor an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """Folder of its model."""
    port: int
    folder: Path
    """Where the engine may write private files of this server."""
    on_gpus: bool
    """Whether it computes on GPUs; otherwise on the host."""
    weights: Weights = Weights.NONE
    """The weights that it has before anything is sent to it."""


@dataclass(frozen=True)
class RunningServer:
    """A server that somebody else has started, as it describes itself."""

    url: str
    kind: str
    """The engine's name."""
    served: str
    """The name that it gives the model."""
    model: str
    """Folder or hub id that it was started with."""
    label: str
    """What it calls its weights."""
    context: int | None
    """Most tokens of prompt and response together; None: it does not say."""
    client: Callable[[int, float, float], HttpEngine]
    """(vocabulary, `deadlines.rollout_s`, `deadlines.silent_s`) → a client that accepts the weights that were found, and no
    others."""


@dataclass(frozen=True)
class SamplingLimits:
    """Which requests a server answers otherwise than it was asked, or refuses."""

    coldest: float
    """Lowest temperature that it samples at: below, it takes another one or the most likely token."""
    hottest: float | None = None
    """Highest temperature that it accepts; None: any."""
    samples_are_one_request: bool = False
    """The samples of a prompt are one request, whose number is bounded by what it decodes at the same time."""


class MakeClient(Protocol):
    """How the client of a server is made."""

    def __call__(self, config: Config, url: str, own: str | None = None) -> HttpEngine:
        """Return the client; it opens no connection before its first request.

        Args:
            own: label of the weights that the server was started with, where they count (`HttpEngine`).
        """


@dataclass(frozen=True)
class EngineKind:
    """One inference server: how it is started, asked, given weights and recognised."""

    name: str
    """As ``rollout.engine`` and messages write it."""
    title: str
    """As its project writes it."""
    packages: tuple[str, ...]
    """Names of its distributions, any of which may be installed (`megatron-hpt doctor`)."""
    plugin_group: str
    """Group of entry points by which it finds our receiver of weights (`megatron-hpt doctor`)."""
    install: str
    """What to do when its environment is missing; in messages."""
    python: Callable[[], str]
    """Returns the interpreter of its environment where the recipe names none (`rollout.python`)."""
    command: Callable[[Config, str, Start], list[str]]
    """(configuration, interpreter, start) → command line of one server. Called by launchers before each start."""
    environment: Callable[[Config, bool], dict[str, str]]
    """(configuration, on GPUs) → environment of the server, inherited variables included (`environment.inherited_here`)."""
    argument_check: str
    """Python that reads ``sys.argv[4:]`` as the server reads its arguments, and raises as it would; run by the engine's
    interpreter with the whole command line behind ``-c`` (`megatron-hpt check`)."""
    client: MakeClient
    """Called by the coordinator and by evaluations, once a server."""
    control: Callable[[str, float, InFlight], EngineControl]
    """(URL, `deadlines.transfer_s`, `transfer.in_flight`) → the control plane of its weight updates. Called by the trainer's
    first rank, once a server."""
    recognise: Callable[[str, httpx.Client], RunningServer | None]
    """(URL, connection to it) → what the server is; None: another kind. May raise EngineError for one that refuses to say, and
    LookupError, TypeError or ValueError for answers that it cannot read."""
    limits: SamplingLimits
    workspace_bytes: Callable[[float], float]
    """Bytes of a GPU's memory that the server takes for itself beside weights and cache, of those that it may have in all
    (`rollout.gpu_memory_share`). `megatron-hpt plan` calculates with it."""
    host_head_dims: tuple[int, ...] = ()
    """Head sizes that its attention has without a GPU; empty: any."""
