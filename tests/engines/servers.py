"""Servers with the routes of an engine, on real sockets, that can be made to fail in every way."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from megatron_hpt.engines.pool import Patience
from megatron_hpt.engines.vllm.server import VllmEngine

PATIENCE = Patience(late_s=0.2, silent_s=1.5, return_s=5.0)


@dataclass
class Server:
    """One server; what it answers is changed while it runs."""

    version: str = "3"
    healthy: bool = True
    stuck: bool = False
    """It answers nothing any more, neither requests nor questions."""
    fails: bool = False
    aborts: int = 0
    """So many of the next requests are ended, as by new weights."""
    slow_s: Callable[[int], float] = lambda seed: 0.0
    """Seconds a request takes, by its seed."""
    tokens: Callable[[int], list[int]] = lambda seed: [seed % 1000]
    """The sample that a seed gives, whoever makes it."""
    seeds: list[int] = field(default_factory=list)
    """Of the requests that came."""
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)
    """What the requests asked the prefix cache to keep them apart by."""
    dropped: list[int] = field(default_factory=list)
    """Seeds of the requests whose client went away."""
    running: int = 0
    produces: bool = True
    """Its count of tokens grows whenever it is asked; else it stands still."""
    produced: int = 0
    url: str = ""

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        seed, number = body["sampling_params"]["seed"], body["sampling_params"]["n"]
        self.seeds.append(seed)
        self.prompts.append(tuple(body["token_ids"]))
        self.salts.append(body["cache_salt"])
        self.running += 1
        try:
            await asyncio.sleep(self.slow_s(seed))
            await self._get_stuck()
        except asyncio.CancelledError:
            self.dropped.append(seed)
            raise
        finally:
            self.running -= 1
        if self.fails:
            return web.Response(status=500, text="out of memory")
        aborted, self.aborts = self.aborts > 0, max(0, self.aborts - 1)
        reason = "abort" if aborted else "stop"
        return web.json_response({"choices": [self._choice(seed + index, reason) for index in range(number)]})

    async def health(self, request: web.Request) -> web.Response:
        await self._get_stuck()
        return web.Response(status=200 if self.healthy else 503)

    async def weight_info(self, request: web.Request) -> web.Response:
        await self._get_stuck()
        return web.json_response({"weight_version": self.version})

    async def metrics(self, request: web.Request) -> web.Response:
        await self._get_stuck()
        self.produced += self.produces
        return web.Response(
            text=f"# TYPE vllm:generation_tokens_total counter\nvllm:generation_tokens_total{{}} {self.produced}"
        )

    async def _get_stuck(self) -> None:
        while self.stuck:
            await asyncio.sleep(0.01)

    def _choice(self, seed: int, reason: str) -> dict[str, Any]:
        tokens = self.tokens(seed)
        return {
            "token_ids": tokens,
            "logprobs": {"content": [{"logprob": -0.5}] * len(tokens)},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
            "finish_reason": reason,
        }


async def start(stack: AsyncExitStack, server: Server) -> VllmEngine:
    """Serve until the stack is closed; returns the client."""
    app = web.Application()
    app.router.add_post("/inference/v1/generate", server.generate)
    app.router.add_get("/health", server.health)
    app.router.add_get("/weight_info", server.weight_info)
    app.router.add_get("/metrics", server.metrics)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    engine = VllmEngine(server.url, 30.0, PATIENCE.silent_s)
    stack.push_async_callback(engine.close)
    return engine


def serve(servers: list[Server], action: Callable[[list[VllmEngine]], Awaitable]) -> Any:
    """Run `action(engines)` while the servers run."""

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            return await action([await start(stack, server) for server in servers])

    return asyncio.run(run())
