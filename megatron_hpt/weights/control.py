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

import base64
import json
import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import httpx
import torch

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.calls import Calls
from megatron_hpt.weights.layouts import EngineLayout
from megatron_hpt.weights.manifest import Contents, Manifest, as_version


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
class Load:
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
    def load(self) -> Load:
        """How busy the engine is."""

    @abstractmethod
    def layout(self) -> EngineLayout:
        """How the engine is cut."""

    def _call(self, method: str, route: str, **request: Any) -> httpx.Response:
        return self._calls.ask(method, route, **request)


class VllmControl(EngineControl):
    """One vLLM server in development mode, our receiver plugged in."""

    def prepare(self, contents: Contents) -> None:
        """See the base class."""
        if self._is_open():  # a trainer died between the start and the end of an update
            self._post("/finish_weight_update", {})
        self._post("/init_weight_transfer_engine", {"init_info": {"contents": contents.to_json()}})
        self._check()

    def _update(self, manifest: Manifest) -> dict[str, float]:
        if self._is_open():
            raise TransferError(f"engine {self.url} is in the middle of an update by another trainer")
        self._post("/start_weight_update")
        try:
            self._post("/update_weights", {"update_info": {"manifest": manifest.to_json()}})
            self._check()
            again = {"reset_running_requests": str(self._in_flight is InFlight.RECOMPUTE).lower()}
            if not self._post("/reset_prefix_cache", params=again).json()["success"] and self._in_flight is not InFlight.KEEP:
                raise TransferError(f"{self.url} did not drop its prefix cache: something still holds blocks of it")
        finally:
            self._post("/finish_weight_update", {})
        seconds = [rank["seconds"] for rank in self._check()]
        self._post("/update_weight_version", {"new_version": str(manifest.version)})
        return {step: max(rank[step] for rank in seconds) for step in seconds[0]}

    def compare(self, contents: Contents, manifest: Manifest) -> None:
        """See the base class."""
        arguments = [json.dumps(contents.to_json()), json.dumps(manifest.to_json())]
        self._post("/collective_rpc", {"method": "transfer_compare", "args": arguments})
        self._check()

    def _is_open(self) -> bool:
        return any(rank["open"] for rank in self._outcomes())

    def _check(self) -> list[dict[str, Any]]:
        """Each rank's outcome of the last step.

        Raises:
            TransferError: what one of them met.
        """
        outcomes = self._outcomes()
        for rank, outcome in enumerate(outcomes):
            if outcome["failure"]:
                raise TransferError(f"engine {self.url}, rank {rank}: {outcome['failure']}")
        return outcomes

    def _outcomes(self) -> list[dict[str, Any]]:
        return self._post("/collective_rpc", {"method": "transfer_outcome"}).json()["results"]

    def pause(self) -> None:
        """See the base class."""
        self._post("/pause", params={"mode": "abort" if self._in_flight is InFlight.ABORT else "keep"})

    def resume(self) -> None:
        """See the base class."""
        self._post("/resume")

    def _sleep(self) -> None:
        self._post("/sleep", params={"level": "2", "mode": "abort"})

    def _wake(self, memory: Memory) -> None:
        """With the last of it vLLM resumes by itself."""
        self._post("/wake_up", params={"tags": memory.value})

    def version(self) -> int | None:
        """See the base class."""
        return as_version(self._call("GET", "/weight_info").json()["weight_version"])

    def load(self) -> Load:
        """See the base class; from its Prometheus metrics."""
        found: dict[str, float] = {}
        for line in self._call("GET", "/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] = float(value) if name and not line.startswith("#") else 0.0
        running, waiting = found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]
        return Load(int(running), int(waiting), found["vllm:kv_cache_usage_perc"])

    def layout(self) -> EngineLayout:
        """See the base class; a server that was not started here tells its number of ranks only."""
        return EngineLayout(int(self._call("GET", "/get_world_size?include_dp=false").json()["world_size"]))

    def _post(self, route: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None) -> httpx.Response:
        return self._call("POST", route, json=body, params=params)


class SglangControl(EngineControl):
    """One SGLang server, our receiver plugged in."""

    _PAUSE: ClassVar = {InFlight.KEEP: "in_place", InFlight.RECOMPUTE: "retract", InFlight.ABORT: "abort"}

    def __init__(self, url: str, deadline_s: float, in_flight: InFlight = InFlight.RECOMPUTE) -> None:
        super().__init__(url, deadline_s, in_flight)
        self._ranks = 0

    def prepare(self, contents: Contents) -> None:
        """See the base class."""
        self._ranks = self.layout().tensor
        self._begin(taking_over=True)
        try:
            self._command("agree", contents.to_json())
        finally:
            self._post("/end_weight_update", {})

    def _update(self, manifest: Manifest) -> dict[str, float]:
        self._begin(taking_over=False)
        try:
            answer = self._command("update", manifest.to_json())
        finally:
            self._post("/end_weight_update", {})
        if self._in_flight is not InFlight.KEEP:
            self._call("POST", "/flush_cache")
        # Last: SGLang would set it with the load, before anything else can fail.
        self._post("/update_weight_version", {"new_version": str(manifest.version), "abort_all_requests": False})
        return json.JSONDecoder().raw_decode(answer)[0]  # SGLang adds a sentence to what our receiver says

    def compare(self, contents: Contents, manifest: Manifest) -> None:
        """See the base class."""
        self._ranks = self.layout().tensor
        self._begin(taking_over=False)
        try:
            self._command("compare", {"contents": contents.to_json(), "manifest": manifest.to_json()})
        finally:
            self._post("/end_weight_update", {})

    def _begin(self, *, taking_over: bool) -> None:
        try:
            self._post("/begin_weight_update", {})
        except TransferError as error:
            if not taking_over or "already open" not in str(error):
                raise
            self._post("/end_weight_update", {})
            self._post("/begin_weight_update", {})

    def _command(self, action: str, body: dict[str, Any]) -> str:
        """Our load format carries a command; SGLang wants it as a pickled list of named tensors, one a rank."""
        data = bytearray(json.dumps({"action": action, "body": body}).encode())
        payload = base64.b64encode(pickle.dumps([("command", torch.frombuffer(data, dtype=torch.uint8))])).decode()
        answer = self._post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": [payload] * self._ranks,
                "load_format": "megatron_hpt",
                "flush_cache": False,
            },
        )
        return answer.json()["message"]

    def pause(self) -> None:
        """See the base class."""
        self._post("/pause_generation", {"mode": self._PAUSE[self._in_flight]})

    def resume(self) -> None:
        """See the base class."""
        self._post("/continue_generation", {})

    def _sleep(self) -> None:
        """A server that is not idle would end: requests are ended, and a cache that can be flushed says that they have."""
        self._post("/pause_generation", {"mode": "abort"})
        self._call("POST", "/flush_cache", params={"timeout": f"{self._deadline_s / 2:g}"})
        self._post("/release_memory_occupation", {"tags": [memory.value for memory in Memory]})

    def _wake(self, memory: Memory) -> None:
        self._post("/resume_memory_occupation", {"tags": [memory.value]})

    def version(self) -> int | None:
        """See the base class."""
        return as_version(self._call("GET", "/model_info").json()["weight_version"])

    def load(self) -> Load:
        """See the base class."""
        (core,) = self._call("GET", "/v1/loads", params={"include": "core"}).json()["loads"]
        return Load(core["num_running_reqs"], core["num_waiting_reqs"], core["token_usage"])

    def layout(self) -> EngineLayout:
        """See the base class."""
        info = self._call("GET", "/server_info").json()
        return EngineLayout(int(info["tp_size"]), int(info["pp_size"]), int(info["ep_size"]))

    def _post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        return self._call("POST", route, json=body)


CONTROLS: dict[str, type[EngineControl]] = {"vllm": VllmControl, "sglang": SglangControl}
"""`rollout.engine` → its control."""


def connect(url: str, deadline_s: float) -> EngineControl:
    """The control of a running engine of either kind.

    Raises:
        EngineGone: nobody answers there.
        TransferError: it is neither.
    """
    for control in (kind(url, deadline_s) for kind in CONTROLS.values()):
        try:
            control.version()
        except TransferError:
            continue
        return control
    raise TransferError(f"{url} is neither a vLLM server in development mode nor an SGLang server, or wants another token")
