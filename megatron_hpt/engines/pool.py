"""Many engines behind one `generate`: routing by load, and engines that go out of service and come back.

An engine is **out** of service when it has failed: it says so, nobody listens any more, or it serves other weights. One that
is merely slow is **late**: it keeps its requests, and gets new ones only where all others are late too. A late engine goes out
of service when it has neither answered nor, as far as it tells, produced a token for `Patience.silent_s`.
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
"""An engine that has a prompt in its prefix cache is chosen unless it has this many requests (of the same size) more than the
least loaded one."""
TRIES = 4
"""Times that one request may fail before it fails the step."""
PERIOD_S = 2.0
"""Seconds between an engine's answer to `health` and the next question."""


@dataclass(frozen=True)
class Patience:
    """How long engines may be silent, in seconds (`DeadlinesConfig`)."""

    late_s: float = 10.0
    """An engine is late after this time without an answer to `health`."""
    silent_s: float = 300.0
    """An engine is given up after this time without any sign of life."""
    return_s: float = 900.0
    """A request waits this long for an engine to come back when none is in service."""


@dataclass(frozen=True)
class Load:
    """The state of one engine, by which `choose` chooses."""

    in_service: bool
    tokens: int
    """Most tokens that its requests in flight may come to, prompts included."""
    late: bool = False


def choose(loads: Sequence[Load], home: int | None, margin: int) -> int | None:
    """Choose the engine of a request: its home, unless that is out or busier than the least loaded by more than `margin`.

    Late engines are chosen only where all that are in service are late.

    Args:
        home: index of the engine that had the same prompt before, if any.
        margin: in tokens, as `Load.tokens`.

    Returns:
        Its index, or None where none is in service.
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
    """Requests that it is working on → the most tokens that each may come to."""
    in_service: bool = True
    reason: str = ""
    """Why it is, or last was, out of service."""
    late: bool = False
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has answered, failed or become late since serving began."""
    progress: Hashable = None
    """Its last answer to `Engine.progress`."""
    progressed: float = 0.0
    """Time at which `progress` last changed, or the server had no requests."""
    served: float = 0.0
    """Time at which it last finished a request."""

    @property
    def load(self) -> Load:
        return Load(self.in_service, sum(self.flight.values()), self.late)

    def is_stuck(self, progress: Hashable, silent_s: float) -> bool:
        """Note the engine's progress; return whether it has had requests for `silent_s` without producing a token."""
        now = time.monotonic()
        if progress is None or progress != self.progress or not self.flight:
            self.progress, self.progressed = progress, now
        return now - self.progressed > silent_s


class EnginePool:
    """Routes requests to engines, for one version of the weights at a time; implements `types.Sampler`.

    Made once by the coordinator and by an evaluation. `generate` may be called inside `serving` only.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        patience: Patience,
        period_s: float = PERIOD_S,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            on_silence: called with the URL of an engine that was given up, so that whoever started it can start it again.
        """
        self._servers = [_Server(engine) for engine in engines]
        self._patience, self._period_s, self._on_silence = patience, period_s, on_silence
        self._version = 0
        self._homes: dict[tuple[int, ...], int] = {}
        self._usable = asyncio.Event()
        self.retried = 0
        """Number of requests that were sent again, to another engine or to one that had come back."""

    @property
    def size(self) -> int:
        """Number of engines in all."""
        return len(self._servers)

    @property
    def in_service(self) -> int:
        """Number of engines in service."""
        return sum(server.in_service for server in self._servers)

    @asynccontextmanager
    async def serving(self, version: int) -> AsyncIterator[None]:
        """Serve requests with weights `version`, and watch the engines, as long as the context lasts.

        It is entered when every engine that was in service has answered or is late, so that the first requests are spread over
        all of them.
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
        """Sample one prompt on the engine that `choose` chooses; if the request fails there, send it to another one, with the
        same seeds, which give the same samples if engines heed them (`rollout.seeded`).

        Raises:
            EngineError: the request failed `TRIES` times; carries the reason of each.
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
        """Return the engine for a request; where none is in service, wait for one to come back."""
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
            EngineError: the engine failed, which takes it out of service, or was taken out by somebody else meanwhile.
            DeadlineError: the answer did not come in time.
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
        """Ask an engine whether it is well and which weights it serves; take it out of service or put it in accordingly."""
        was_out, needed, asked = not server.in_service, self._version, time.monotonic()
        try:
            version, progress = await self._answer(server)
        except DeadlineError as error:
            if server.served < asked:  # else it has finished a request since: it is late, but works
                self._give_up(server, str(error))
        except EngineError as error:
            self._take_out(server, str(error))
        else:
            if version != needed:
                self._take_out(server, f"serves weights {version}; {needed} are needed")
            elif was_out:  # one that was in when it was asked may have failed a request since, which counts more
                self._put_in(server)
            if server.is_stuck(progress, self._patience.silent_s):
                self._give_up(
                    server,
                    f"engine {server.engine.url} has produced no token for {self._patience.silent_s:g} s "
                    f"(deadlines.silent_s), with {len(server.flight)} requests to work on",
                )

    async def _answer(self, server: _Server) -> tuple[int | None, Hashable]:
        """Return an engine's version and progress, however late they come; note when it becomes late, and when it no longer is.

        Raises as `Engine.health`.
        """
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
        """Mark an engine late, with one warning: on a busy machine it may be late for minutes and still finish its requests."""
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
    """Return the most tokens that a request may come to."""
    return len(request.tokens) + request.samples * request.max_tokens
