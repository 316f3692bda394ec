"""Weight updates of a vLLM server, by the routes of its development mode (vllm/entrypoints/rl/online/api_router.py)."""

from __future__ import annotations

import json
from typing import Any

import httpx

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.control import EngineControl, InFlight, Memory, ServerLoad
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest, as_version


class VllmControl(EngineControl):
    """The control plane of one vLLM server in development mode with our receiver (`engines.vllm.plugin`)."""

    def prepare(self, contents: Contents) -> None:
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
        arguments = [json.dumps(contents.to_json()), json.dumps(manifest.to_json())]
        self._post("/collective_rpc", {"method": "transfer_compare", "args": arguments})
        self._check()

    def _is_open(self) -> bool:
        return any(rank["open"] for rank in self._outcomes())

    def _check(self) -> list[dict[str, Any]]:
        """Return each rank's outcome of the last step.

        Raises:
            TransferError: a rank failed; carries its message.
        """
        outcomes = self._outcomes()
        for rank, outcome in enumerate(outcomes):
            if outcome["failure"]:
                raise TransferError(f"engine {self.url}, rank {rank}: {outcome['failure']}")
        return outcomes

    def _outcomes(self) -> list[dict[str, Any]]:
        return self._post("/collective_rpc", {"method": "transfer_outcome"}).json()["results"]

    def pause(self) -> None:
        self._post("/pause", params={"mode": "abort" if self._in_flight is InFlight.ABORT else "keep"})

    def resume(self) -> None:
        self._post("/resume")

    def _sleep(self) -> None:
        self._post("/sleep", params={"level": "2", "mode": "abort"})

    def _wake(self, memory: Memory) -> None:
        # vLLM resumes by itself when it has all of its memory again.
        self._post("/wake_up", params={"tags": memory.value})

    def version(self) -> int | None:
        return as_version(self._call("GET", "/weight_info").json()["weight_version"])

    def load(self) -> ServerLoad:
        metrics: dict[str, float] = {}
        for line in self._call("GET", "/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            metrics[name.partition("{")[0]] = float(value) if name and not line.startswith("#") else 0.0
        running, waiting = metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]
        return ServerLoad(int(running), int(waiting), metrics["vllm:kv_cache_usage_perc"])

    def layout(self) -> EngineLayout:
        # A server says how many ranks it has, not how it shares the model out; we start none but tensor parallel ones.
        return EngineLayout(int(self._call("GET", "/get_world_size?include_dp=false").json()["world_size"]))

    def _post(self, route: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None) -> httpx.Response:
        return self._call("POST", route, json=body, params=params)
