"""Many engines behind one `generate`: routing by load, and engines that go out of service and come back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megatron_hpt.errors import DeadlineError, EngineError
from megatron_hpt.rollout.engine import Engine, Sample, SamplingRequest

logger = logging.getLogger(__name__)

MARGIN = 16
"""Requests of the same size by which the engine that has a prompt in its prefix cache may be busier than the least loaded."""
TRIES = 4
"""Engines that one request may fail on before it fails the step."""
LATE = 3
"""Late answers in a row, to the question how an engine is, that take it out."""
PERIOD_S = 2.0
"""Seconds between two such questions."""


@dataclass(frozen=True)
class Load:
    """What the choice of an engine depends on."""

    in_service: bool
    tokens: int
    """That its requests in flight may come to."""


def choose(loads: Sequence[Load], home: int | None, margin: int) -> int | None:
    """Index of the engine for a request: its home, unless that is out or busier than the least loaded by more than `margin`.

    Args:
        home: the engine that had the same prompt before.

    Returns:
        None where none is in service.
    """
    usable = [index for index, load in enumerate(loads) if load.in_service]
    if not usable:
        return None
    least = min(usable, key=lambda index: loads[index].tokens)
    if home in usable and loads[home].tokens <= loads[least].tokens + margin:
        return home
    return least


@dataclass
class _Server:
    """One engine and what the pool knows of it."""

    engine: Engine
    flight: dict[asyncio.Task, int] = field(default_factory=dict)
    """Requests it is working on, and the tokens that each may come to."""
    in_service: bool = True
    reason: str = ""
    """Why it is, or last was, out of service."""
    late: int = 0
    """Late answers in a row."""

    @property
    def load(self) -> Load:
        return Load(self.in_service, sum(self.flight.values()))


class EnginePool:
    """Engines that sample for one step at a time."""

    def __init__(self, engines: Sequence[Engine], return_s: float, period_s: float = PERIOD_S) -> None:
        """
        Args:
            return_s: how long a request waits for an engine to come back when none is in service.
        """
        self._servers = [_Server(engine) for engine in engines]
        self._return_s, self._period_s = return_s, period_s
        self._version = 0
        self._homes: dict[tuple[int, ...], int] = {}
        self._usable = asyncio.Event()
        self.retried = 0
        """Times that a request was sent again, to another engine or to one that had come back."""

    @property
    def size(self) -> int:
        """Engines in all."""
        return len(self._servers)

    @property
    def in_service(self) -> int:
        """Engines in service."""
        return sum(server.in_service for server in self._servers)

    @asynccontextmanager
    async def serving(self, version: int) -> AsyncIterator[None]:
        """While it lasts, requests are served by weights `version`, and the engines are watched.

        Engines that were in service before are asked first, so that the first requests find all of them.
        """
        self._version, self._homes = version, {}
        await asyncio.gather(*(self._ask(server) for server in self._servers if server.in_service))
        self._note_usable()
        watch = asyncio.gather(*(self._watch(server) for server in self._servers))
        try:
            yield
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt on whichever engine is best; a request that fails there goes to another, with the same seeds.

        Raises:
            EngineError: it failed on `TRIES` engines; names each of them.
            DeadlineError: an engine did not answer in time, or none was in service for too long; names who and why.
        """
        failed: list[str] = []
        while True:
            server = await self._place(request)
            try:
                return await self._try(server, request)
            except EngineError as error:
                failed.append(str(error))
            if len(failed) == TRIES:
                raise EngineError(f"a request failed {TRIES} times: " + "; then ".join(failed))
            self.retried += 1

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.engine.close()

    async def _place(self, request: SamplingRequest) -> _Server:
        """The engine for a request, waiting for one to come back where there is none."""
        while True:
            prompt = tuple(request.tokens)
            loads = [server.load for server in self._servers]
            chosen = choose(loads, self._homes.get(prompt), MARGIN * _size(request))
            if chosen is not None:
                self._homes[prompt] = chosen
                return self._servers[chosen]
            try:
                await asyncio.wait_for(self._usable.wait(), self._return_s)
            except TimeoutError:
                raise DeadlineError(
                    f"no engine in service for {self._return_s:g} s: "
                    + "; ".join(f"{server.engine.url} is out ({server.reason})" for server in self._servers)
                ) from None

    async def _try(self, server: _Server, request: SamplingRequest) -> list[Sample]:
        """Sample on one engine.

        Raises:
            EngineError: it failed, which takes it out, or was taken out meanwhile.
            DeadlineError: no answer in time.
        """
        task = asyncio.create_task(server.engine.generate(request))
        server.flight[task] = _size(request)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            del server.flight[task]
        if task.cancelled():
            raise EngineError(f"engine {server.engine.url} was taken out: {server.reason}")
        try:
            samples = task.result()
            wrong = {sample.version for sample in samples} - {self._version}
            if wrong:
                raise EngineError(
                    f"engine {server.engine.url} sampled with weights {sorted(wrong)}; the batch needs {self._version}"
                )
        except EngineError as error:
            self._take_out(server, str(error))
            raise
        return samples

    async def _watch(self, server: _Server) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._ask(server)

    async def _ask(self, server: _Server) -> None:
        """How an engine is, and what it serves; it goes out or comes back accordingly."""
        was_out, needed = not server.in_service, self._version
        try:
            await server.engine.health()
            version = await server.engine.version()
        except DeadlineError as error:
            server.late += 1
            if server.late >= LATE:
                self._take_out(server, f"{error}, {server.late} times in a row")
        except EngineError as error:
            self._take_out(server, str(error))
        else:
            server.late = 0
            if version != needed:
                self._take_out(server, f"serves weights {version}; {needed} are needed")
            elif was_out:  # else a request may have found out meanwhile what this answer did not know yet
                self._put_in(server)

    def _take_out(self, server: _Server, reason: str) -> None:
        server.reason = reason
        if not server.in_service:
            return
        logger.warning("engine %s is out, %d requests go elsewhere: %s", server.engine.url, len(server.flight), reason)
        server.in_service = False
        self._note_usable()
        for task in server.flight:
            task.cancel()

    def _put_in(self, server: _Server) -> None:
        logger.warning("engine %s is in service again", server.engine.url)
        server.in_service = True
        self._note_usable()

    def _note_usable(self) -> None:
        if self.in_service:
            self._usable.set()
        else:
            self._usable.clear()


def _size(request: SamplingRequest) -> int:
    """Tokens that a request may come to."""
    return len(request.tokens) + request.samples * request.max_tokens
