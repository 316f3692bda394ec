"""An engine that takes as long as it is told and uses no core: what engines on machines of their own look like to a trainer.

``rollout.engine=benchmarks/sleeping_engine.py:SLEEPING``. Its answers are random tokens with the log-probabilities of an
untrained model; the environment variable SECONDS_A_REQUEST says how long each takes. As a program,
``sleeping_engine.py PORT VOCABULARY``, it is the server.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import sys
from typing import Any

from aiohttp import web

from megatron_hpt.config import Config
from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.interface import EngineKind, SamplingLimits, Start
from megatron_hpt.engines.types import Sample, SamplingRequest, Span
from megatron_hpt.environment import inherited_here
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.transfer.control import EngineControl, Memory, ServerLoad
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest, as_version

SECONDS = "SECONDS_A_REQUEST"


class SleepingClient(HttpEngine):
    """The coordinator's side."""

    generate_route = "/generate"
    version_route = "/weights"

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        return {"samples": request.samples, "seed": request.seed, "tokens": request.max_tokens}

    def samples(self, answer: Any) -> list[Sample]:
        return [self.whole_sample(tokens, logprobs, "length", [Span(version, 0)]) for tokens, logprobs, version in answer]


class SleepingControl(EngineControl):
    """The trainer's side: nothing but the version is sent."""

    def prepare(self, contents: Contents) -> None:
        pass

    def _update(self, manifest: Manifest) -> dict[str, float]:
        self._call("POST", "/version", json=manifest.version)
        return {"receive": 0.0, "load": 0.0}

    def compare(self, contents: Contents, manifest: Manifest) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def _sleep(self) -> None:
        pass

    def _wake(self, memory: Memory) -> None:
        pass

    def version(self) -> int | None:
        return as_version(self._call("GET", "/weights").json()["weight_version"])

    def load(self) -> ServerLoad:
        return ServerLoad(0, 0, 0.0)

    def layout(self) -> EngineLayout:
        return EngineLayout(1)


def command(config: Config, python: str, start: Start) -> list[str]:
    return [python, __file__, str(start.port), str(run_shape(config).vocab)]


def client(config: Config, url: str, own: str | None = None) -> SleepingClient:
    return SleepingClient(url, config.deadlines.rollout_s, config.deadlines.silent_s, own=own)


SLEEPING = EngineKind(
    name="sleeping",
    title="Sleeping",
    packages=(),
    plugin_group="",
    install="nothing",
    python=lambda: sys.executable,
    command=command,
    environment=lambda config, on_gpus: inherited_here(),
    argument_check="",
    client=client,
    control=SleepingControl,
    recognise=lambda url, http: None,
    limits=SamplingLimits(coldest=1.0, hottest=1.0),
    workspace_bytes=lambda share: 0.0,
)


def serve(port: int, vocabulary: int) -> None:
    """Answer until the run ends."""
    version, seconds = "none yet", float(os.environ[SECONDS])

    async def generate(request: web.Request) -> web.Response:
        body, sampled_by = await request.json(), version
        await asyncio.sleep(seconds)
        draw, length = random.Random(body["seed"]), body["tokens"]
        logprobs = [-math.log(vocabulary)] * length
        return web.json_response(
            [([draw.randrange(vocabulary) for _ in range(length)], logprobs, sampled_by) for _ in range(body["samples"])]
        )

    async def weights(_: web.Request) -> web.Response:
        return web.json_response({"weight_version": version})

    async def take(request: web.Request) -> web.Response:
        nonlocal version
        version = str(await request.json())
        return web.Response()

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/weights", weights), web.post("/version", take)])
    app.add_routes([web.post("/generate", generate)])
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
