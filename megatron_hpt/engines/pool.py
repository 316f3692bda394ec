"""Many engines behind one `generate`: routing by load, and engines that go out of service and come back.

An engine is **out** when it has failed: it says so, nobody listens any more, or it serves other weights. One that is merely
slow is **late**: it keeps its requests, and gets new ones only where all others are late too. Late becomes out after a deadline
of its own, in which the engine has neither answered nor, as far as it tells, produced a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from megatron_hpt.engines.types import Engine, Sample, SamplingRequest
from megatron_hpt.errors import DeadlineError, EngineError

logger = logging.getLogger(__name__)

MARGIN = 16
"""Requests of the same size by which the engine that has a prompt in its prefix cache may be busier than the least loaded."""
TRIES = 4
"""Engines that one request may fail on before it fails the step."""
PERIOD_S = 2.0
"""Seconds between an engine's answer to how it is and the next such question."""


@dataclass(frozen=True)
class Patience:
    """How long engines may be silent, in seconds (`DeadlinesConfig`)."""

    late_s: float = 10.0
    """Without an answer to how it is: an engine is late."""
    silent_s: float = 300.0
    """Without any sign of life: it is given up."""
    return_s: float = 900.0
    """A request waits so long for an engine to come back when none is in service."""


@dataclass(frozen=True)
class Load:
    """What the choice of an engine depends on."""

    in_service: bool
    tokens: int
    """That its requests in flight may come to."""
    late: bool = False


def choose(loads: Sequence[Load], home: int | None, margin: int) -> int | None:
    """Index of the engine for a request: its home, unless that is out or busier than the least loaded by more than `margin`.

    Late engines are chosen only where all that are in service are late.

    Args:
        home: the engine that had the same prompt before.

    Returns:
        None where none is in service.
    """
    serving = [index for index, load in enumerate(loads) if load.in_service]
    if not serving:
        return None
    usable = [index for index in serving if not loads[index].late] or serving
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
    late: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has answered, failed or become late, since serving began."""
    progress: Hashable = None
    """What it last told of the tokens that it has produced."""
    progressed: float = 0.0
    """When that last changed, or there was nothing to do."""
    served: float = 0.0
    """When it last finished a request."""

    @property
    def load(self) -> Load:
        return Load(self.in_service, sum(self.flight.values()), self.late)

    def is_stuck(self, progress: Hashable, silent_s: float) -> bool:
        """Note what the engine tells of its tokens; whether it has worked on requests for so long without any."""
        now = time.monotonic()
        if progress is None or progress != self.progress or not self.flight:
            self.progress, self.progressed = progress, now
        return now - self.progressed > silent_s


class EnginePool:
    """Engines that sample for one step at a time."""

    def __init__(
        self,
        engines: Sequence[Engine],
        patience: Patience,
        period_s: float = PERIOD_S,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            on_silence: is told the URL of an engine that was given up, where somebody can start it again.
        """
        self._servers = [_Server(engine) for engine in engines]
        self._patience, self._period_s, self._on_silence = patience, period_s, on_silence
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

        It begins when engines that were in service have answered or are late, so that the first requests find all of them.
        """
        self._version, self._homes = version, {}
        for server in self._servers:
            server.heard.clear()
        watch = asyncio.gather(*(self._watch(server) for server in self._servers))
        try:
            await asyncio.gather(*(server.heard.wait() for server in self._servers if server.in_service))
            self._note_usable()
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
                await asyncio.wait_for(self._usable.wait(), self._patience.return_s)
            except TimeoutError:
                raise DeadlineError(
                    f"no engine in service for {self._patience.return_s:g} s: "
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
        server.served = server.progressed = time.monotonic()
        return samples

    async def _watch(self, server: _Server) -> None:
        while True:
            await self._ask(server)
            server.heard.set()
            await asyncio.sleep(self._period_s)

    async def _ask(self, server: _Server) -> None:
        """How an engine is, and what it serves; it goes out, becomes late or comes back accordingly."""
        was_out, needed, asked = not server.in_service, self._version, time.monotonic()
        try:
            version, progress = await self._answer(server)
        except DeadlineError as error:
            if server.served < asked:  # else it is late, and works
                self._give_up(server, str(error))
        except EngineError as error:
            self._take_out(server, str(error))
        else:
            if version != needed:
                self._take_out(server, f"serves weights {version}; {needed} are needed")
            elif was_out:  # else a request may have found out meanwhile what this answer did not know yet
                self._put_in(server)
            if server.is_stuck(progress, self._patience.silent_s):
                self._give_up(
                    server,
                    f"engine {server.engine.url} has produced no token for {self._patience.silent_s:g} s "
                    f"(deadlines.silent_s), with {len(server.flight)} requests to work on",
                )

    async def _answer(self, server: _Server) -> tuple[int | None, Hashable]:
        """The version that an engine serves and its progress, however late it answers. Raises as `Engine.health`."""
        question = asyncio.create_task(_question(server.engine))
        try:
            await asyncio.wait([question], timeout=self._patience.late_s)
            if not question.done():
                self._note_late(server)
            answer = await question
        finally:
            question.cancel()
        if server.late:
            logger.warning("engine %s answers again", server.engine.url)
            server.late = False
        return answer

    def _note_late(self, server: _Server) -> None:
        """Say it once: an engine on a busy machine may be late for minutes, and ends its requests all the same."""
        server.heard.set()
        if server.in_service and not server.late:
            logger.warning(
                "engine %s has not answered for %g s (deadlines.health_s): it is late and keeps its %d requests; after %g s "
                "of silence (deadlines.silent_s) it is given up",
                *(server.engine.url, self._patience.late_s, len(server.flight), self._patience.silent_s),
            )
        server.late = True

    def _give_up(self, server: _Server, reason: str) -> None:
        was_in = server.in_service
        self._take_out(server, reason)
        if was_in and self._on_silence is not None:
            self._on_silence(server.engine.url)

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


async def _question(engine: Engine) -> tuple[int | None, Hashable]:
    await engine.health()
    return await engine.version(), await engine.progress()


def _size(request: SamplingRequest) -> int:
    """Tokens that a request may come to."""
    return len(request.tokens) + request.samples * request.max_tokens
