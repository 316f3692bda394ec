"""The control plane of one engine: weight updates and sleep through the engine's own HTTP API, called synchronously.

An `EngineControl` is made by `engines.registry.control` for each engine of a run, and by `registry.connect` for any running
engine. `sending.driver.EngineDriver` calls it on the trainer's rank 0, several engines at once, each from one thread at a time;
`tools/weight_transfer.py` calls it too. For a version the driver calls `version` and, where the
engine is new or an update has failed since, `prepare`; then `update` and `resume`.

Every method may raise:

* `EngineGone`: nobody answers there. The driver goes on without the engine.
* `DeadlineError`: the engine did not answer within `deadline_s`. The run ends.
* `TransferError`: the engine refused; the message carries its own words. The run ends.

The calls behind the steps are:

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
    """What happens to requests that are under way when weights change: `transfer.in_flight`."""

    KEEP = "keep"
    """They go on with the keys and values of the old weights."""
    RECOMPUTE = "recompute"
    """Their keys and values are computed again with the new weights."""
    ABORT = "abort"
    """They end at once with what they have."""


class Memory(Enum):
    """The kinds of device memory that an engine gives back when it sleeps, by the name that both engines have for them."""

    WEIGHTS = "weights"
    CACHE = "kv_cache"


@dataclass(frozen=True)
class ServerLoad:
    """How busy an engine is; `tools/weight_transfer.py watch` shows it."""

    running: int
    """Requests that it decodes."""
    waiting: int
    """Requests that wait."""
    cache: float
    """Share of the KV cache in use."""


class EngineControl(ABC):
    """What an engine's control plane must provide; `engines/vllm/control.py` and `engines/sglang/control.py` do."""

    def __init__(self, url: str, deadline_s: float, in_flight: InFlight = InFlight.RECOMPUTE) -> None:
        self.url = url
        self._asleep: set[Memory] = set()
        self._deadline_s, self._in_flight = deadline_s, in_flight
        self._calls = Calls(url, deadline_s)

    @abstractmethod
    def prepare(self, contents: Contents) -> None:
        """Have the engine agree on what a trainer will send, in place of any other trainer and of updates left open.

        Called before the first `update` of a trainer and after each one that failed. With a transport that meets
        (`Transport.meets`) it returns when the engine's ranks and all trainer ranks have joined their group.
        """

    def update(self, manifest: Manifest) -> dict[str, float]:
        """Bring the engine to `manifest.version`, whole: pause, transfer, verify, load, drop caches, compare.

        Called after `prepare` with the contents that the manifest names. The version is set by the last call that can fail, so
        an engine that reports it serves it. The engine stays paused until `resume`, also after an error.

        Returns:
            Seconds of its slowest rank: ``receive``, ``load``, and ``compare`` where the manifest asks for it.

        Raises:
            TransferError: also bytes that arrived damaged, weights that are not those sent, or another version afterwards.
        """
        self.pause()
        seconds = self._update(manifest)
        if self.version() != manifest.version:
            raise TransferError(f"{self.url} reports version {self.version()} after an update to {manifest.version}")
        return seconds

    @abstractmethod
    def _update(self, manifest: Manifest) -> dict[str, float]:
        """Do the part of `update` between the pause and the check of the version."""

    @abstractmethod
    def compare(self, contents: Contents, manifest: Manifest) -> None:
        """Compare the engine's weights with others that it can reach, for `tools/weight_transfer.py verify`.

        Nothing is loaded, and the trainer that has prepared the engine may go on.

        Raises:
            TransferError: names the first tensor that differs.
        """

    @abstractmethod
    def pause(self) -> None:
        """Stop generating; what happens to requests under way is the `InFlight` that this control was made with."""

    @abstractmethod
    def resume(self) -> None:
        """Generate again; weights and caches must have their memory."""

    def sleep(self) -> None:
        """Free the device memory of weights and caches, for a trainer on the same devices; idempotent.

        Requests that are under way end. An engine on a host keeps its memory.
        """
        if not self._asleep:
            self._sleep()
            self._asleep = set(Memory)

    def wake(self, memory: Memory) -> None:
        """Reallocate memory without restoring its contents; idempotent. Both kinds must be there before `resume`."""
        if memory in self._asleep:
            self._wake(memory)
            self._asleep.remove(memory)

    def note_restart(self) -> None:
        """Note that the server has been started again, so it is awake: an SGLang server that is woken twice ends."""
        self._asleep.clear()

    @abstractmethod
    def _sleep(self) -> None: ...

    @abstractmethod
    def _wake(self, memory: Memory) -> None: ...

    @abstractmethod
    def version(self) -> int | None:
        """Return the version that the engine serves, or None before it has been sent one."""

    @abstractmethod
    def load(self) -> ServerLoad:
        """Return how busy the engine is."""

    @abstractmethod
    def layout(self) -> EngineLayout:
        """Return how the engine is cut, as far as it tells. A run has its engines' layout from the configuration instead."""

    def _call(self, method: str, route: str, **request: Any) -> httpx.Response:
        return self._calls.ask(method, route, **request)
