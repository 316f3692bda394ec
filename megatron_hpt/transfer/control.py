"""The control plane of one engine's weight update: the engine's own HTTP API, called synchronously from the trainer.

prepare → (transfer) → verify → commit, the same for both engines:

| | vLLM 0.32 (entrypoints/rl/online/api_router.py) | SGLang 0.5.23 (entrypoints/http_server.py) |
|---|---|---|
| prepare | /init_weight_transfer_engine | /update_weights_from_tensor of our load format |
| pause | /pause | /pause_generation |
| transfer, verify, load | /start_weight_update, /update_weights | /begin_weight_update, /update_weights_from_tensor |
| outcome of each rank | /collective_rpc | the answer |
| commit | /reset_prefix_cache, /finish_weight_update | /end_weight_update, /flush_cache |
| version | /update_weight_version | /update_weight_version |
| resume | /resume | /continue_generation |

An engine on the trainer's GPUs sleeps while it trains: sleep → (step) → wake(WEIGHTS) → update → wake(CACHE) → resume.

| | vLLM (entrypoints/serve/dev/sleep/api_router.py) | SGLang |
|---|---|---|
| sleep | /sleep: level 2, nothing is kept on the host | /pause_generation, /flush_cache, /release_memory_occupation |
| wake | /wake_up | /resume_memory_occupation |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

import httpx

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.calls import Calls
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest


class InFlight(Enum):
    """What happens to requests that are under way when weights change."""

    KEEP = "keep"
    """They go on with the keys and values of the old weights."""
    RECOMPUTE = "recompute"
    """Their keys and values are computed again with the new weights."""
    ABORT = "abort"
    """They end at once with what they have."""


class Memory(Enum):
    """What an engine gives back when it sleeps, as both engines call it."""

    WEIGHTS = "weights"
    CACHE = "kv_cache"


@dataclass(frozen=True)
class ServerLoad:
    """How busy an engine is."""

    running: int
    """Requests that it decodes."""
    waiting: int
    """Requests that wait."""
    cache: float
    """Share of the KV cache in use."""


class EngineControl(ABC):
    """Weight updates of one server."""

    def __init__(self, url: str, deadline_s: float, in_flight: InFlight = InFlight.RECOMPUTE) -> None:
        self.url = url
        self._asleep: set[Memory] = set()
        self._deadline_s, self._in_flight = deadline_s, in_flight
        self._calls = Calls(url, deadline_s)

    @abstractmethod
    def prepare(self, contents: Contents) -> None:
        """Introduce a trainer and what it will send; whatever another one left open is given up.

        Raises:
            TransferError: the engine refused; carries its own words.
            EngineGone: nobody answers.
            DeadlineError: it did not answer in time.
        """

    def update(self, manifest: Manifest) -> dict[str, float]:
        """Bring the engine to `manifest.version`, whole: pause, transfer, verify, load, drop caches, compare.

        The version is set by the last call that can fail, so an engine that reports it serves it. The engine stays paused,
        until `resume` or, after an error, until an update succeeds.

        Returns:
            Seconds of its slowest rank: receive, load, and compare where that was asked for.

        Raises: as `prepare`.
        """
        self.pause()
        seconds = self._update(manifest)
        if self.version() != manifest.version:
            raise TransferError(f"{self.url} reports version {self.version()} after an update to {manifest.version}")
        return seconds

    @abstractmethod
    def _update(self, manifest: Manifest) -> dict[str, float]: ...

    @abstractmethod
    def compare(self, contents: Contents, manifest: Manifest) -> None:
        """Compare the engine's weights with others that it can reach; nothing is loaded, no trainer loses its place.

        Raises:
            TransferError: naming the first tensor that differs.
        """

    @abstractmethod
    def pause(self) -> None:
        """Stop generating; requests under way are kept, recomputed or aborted as this control was told."""

    @abstractmethod
    def resume(self) -> None:
        """Generate again."""

    def sleep(self) -> None:
        """Free the device memory of weights and caches, for a trainer on the same devices; twice is once.

        Requests that are under way end. On a host the memory stays. Raises: as `prepare`.
        """
        if not self._asleep:
            self._sleep()
            self._asleep = set(Memory)

    def wake(self, memory: Memory) -> None:
        """Take memory again, its contents lost; twice is once. Both must be there before `resume`. Raises: as `prepare`."""
        if memory in self._asleep:
            self._wake(memory)
            self._asleep.remove(memory)

    def note_restart(self) -> None:
        """The server has been started again, so it is awake. SGLang ends a server that is woken twice."""
        self._asleep.clear()

    @abstractmethod
    def _sleep(self) -> None: ...

    @abstractmethod
    def _wake(self, memory: Memory) -> None: ...

    @abstractmethod
    def version(self) -> int | None:
        """The version that the engine says it serves; None: none of ours."""

    @abstractmethod
    def load(self) -> ServerLoad:
        """How busy the engine is."""

    @abstractmethod
    def layout(self) -> EngineLayout:
        """How the engine is cut."""

    def _call(self, method: str, route: str, **request: Any) -> httpx.Response:
        return self._calls.ask(method, route, **request)
