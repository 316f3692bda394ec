"""Weight updates of an SGLang server, by the routes of its server (sglang/srt/entrypoints/http_server.py)."""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any, ClassVar

import httpx

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.control import EngineControl, InFlight, Memory, ServerLoad
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest, as_version


class SglangControl(EngineControl):
    """The control plane of one SGLang server with our receiver (`engines.sglang.plugin`)."""

    _PAUSE: ClassVar = {InFlight.KEEP: "in_place", InFlight.RECOMPUTE: "retract", InFlight.ABORT: "abort"}

    def __init__(self, url: str, deadline_s: float, in_flight: InFlight = InFlight.RECOMPUTE) -> None:
        super().__init__(url, deadline_s, in_flight)
        self._ranks = 0

    def prepare(self, contents: Contents) -> None:
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
        # The version comes last, because everything before it can fail; SGLang by itself would set it with the load.
        self._post("/update_weight_version", {"new_version": str(manifest.version), "abort_all_requests": False})
        return json.JSONDecoder().raw_decode(answer)[0]  # SGLang adds a sentence to our receiver's JSON

    def compare(self, contents: Contents, manifest: Manifest) -> None:
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
        """Have every rank's receiver carry out an action, and return its answer.

        The command travels as our load format, for which SGLang wants a pickled list of named tensors, one for each rank.
        """
        import torch  # here, since whoever only plans does without

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
        self._post("/pause_generation", {"mode": self._PAUSE[self._in_flight]})

    def resume(self) -> None:
        self._post("/continue_generation", {})

    def _sleep(self) -> None:
        # A server that is not idle would end. So requests are ended first; that the cache can be flushed shows that they have.
        self._post("/pause_generation", {"mode": "abort"})
        self._call("POST", "/flush_cache", params={"timeout": f"{self._deadline_s / 2:g}"})
        self._post("/release_memory_occupation", {"tags": [memory.value for memory in Memory]})

    def _wake(self, memory: Memory) -> None:
        self._post("/resume_memory_occupation", {"tags": [memory.value]})

    def version(self) -> int | None:
        return as_version(self._call("GET", "/model_info").json()["weight_version"])

    def load(self) -> ServerLoad:
        (core,) = self._call("GET", "/v1/loads", params={"include": "core"}).json()["loads"]
        return ServerLoad(core["num_running_reqs"], core["num_waiting_reqs"], core["token_usage"])

    def layout(self) -> EngineLayout:
        info = self._call("GET", "/server_info").json()
        return EngineLayout(int(info["tp_size"]), int(info["pp_size"]), int(info["ep_size"]))

    def _post(self, route: str, body: dict[str, Any]) -> httpx.Response:
        return self._call("POST", route, json=body)
