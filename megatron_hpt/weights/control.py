"""The control plane of one engine's weight update: vLLM's own HTTP API, called synchronously from the trainer.

Routes (vllm/entrypoints/rl/online/api_router.py, vLLM 0.32, server in development mode): pause, start_weight_update,
update_weights, finish_weight_update, reset_prefix_cache, resume, weight_info.
"""

from __future__ import annotations

from typing import Any

import httpx

from megatron_hpt.errors import DeadlineError, TransferError
from megatron_hpt.weights.manifest import Manifest


class VllmControl:
    """Weight updates of one vLLM server."""

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url = url
        self._deadline_s = deadline_s
        # No connection is kept: the server closes idle ones after 5 s, and a training step lasts longer.
        self._http = httpx.Client(
            base_url=url, timeout=deadline_s, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    def prepare(self) -> None:
        """Introduce our receiver; once, before the first update."""
        self._post("/init_weight_transfer_engine", {"init_info": {}})

    def update(self, manifest: Manifest) -> None:
        """Bring the engine to `manifest.version`, whole: pause, load, verify, drop caches, resume.

        The version is set by the last call that can fail, so an engine that reports it serves it. After an error the
        engine stays paused: it is not used until an update succeeds.

        Raises:
            TransferError: the engine refused or failed; carries its own words.
            DeadlineError: it did not answer in time.
        """
        version = str(manifest.version)
        self._post("/pause", params={"mode": "keep"})
        self._post("/start_weight_update")
        self._post("/update_weights", {"update_info": {"manifest": manifest.to_json()}})
        if not self._post("/reset_prefix_cache").json()["success"]:
            raise TransferError(f"{self.url} did not drop its prefix cache: something still holds blocks of it")
        self._post("/finish_weight_update", {"weight_version": version})
        if self.version() != version:
            raise TransferError(f"{self.url} reports version {self.version()} after an update to {version}")
        self._post("/resume")

    def version(self) -> str:
        """The version that the engine says it serves."""
        return self._call("GET", "/weight_info").json()["weight_version"]

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _post(self, route: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None) -> httpx.Response:
        return self._call("POST", route, json=body, params=params)

    def _call(self, method: str, route: str, **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, route, **request)
        except httpx.TimeoutException:
            raise DeadlineError(f"engine {self.url} did not answer {route} within {self._deadline_s:g} s") from None
        except httpx.HTTPError as error:
            raise TransferError(f"engine {self.url} cannot be reached for {route}: {error}") from None
        if response.status_code != httpx.codes.OK:
            raise TransferError(f"engine {self.url} failed {route} ({response.status_code}): {response.text[:2000]}")
        return response
