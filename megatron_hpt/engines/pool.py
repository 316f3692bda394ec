"""Many engines behind one `generate`: routing by load, and engines that go out of service and come back.

An engine is **out** of service when it has failed: it says so, or nobody listens any more. One that is merely slow is **late**:
it keeps its requests, and gets new ones only where all others are late too. A late engine goes out of service when it has
neither answered nor, as far as it tells, produced a token for `Patience.silent_s`.

Requests come from batches and evaluations, each of which says which versions of the weights it takes (`Versions`). An engine
that serves another version gets none of its requests, and loses those that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

from megatron_hpt.engines.types import Engine, Sample, Sampler, SamplingRequest, Versions
from megatron_hpt.errors import DeadlineError, EngineError, RequestAborted

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
    """Whether it may be asked: it works, and serves weights that the request takes."""
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


@dataclass(frozen=True)
class _Flight:
    """A request that an engine is working on."""

    tokens: int
    """Most tokens that it may come to."""
    versions: Versions


@dataclass
class _Server:
    """One engine and what the pool knows of it."""

    engine: Engine
    flight: dict[asyncio.Task, _Flight] = field(default_factory=dict)
    in_service: bool = True
    reason: str = ""
    """Why it is, or last was, out of service."""
    version: int | None = None
    """The weights that it last said it serves; they may be newer by now."""
    late: bool = False
    ask_now: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to have it asked at once how it is."""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has answered, failed or become late since it was cleared."""
    progress: Hashable = None
    """Its last answer to `Engine.progress`."""
    progressed: float = 0.0
    """Time at which `progress` last changed, or the server had no requests."""
    served: float = 0.0
    """Time at which it last finished a request."""
    busy_s: float = 0.0
    """Seconds in which it had requests, up to when it last had none."""
    busy_since: float = 0.0

    def load(self, versions: Versions) -> Load:
        """Return its state for a request that takes these versions."""
        tokens = sum(flight.tokens for flight in self.flight.values())
        return Load(self.obstacle(versions) is None, tokens, self.late)

    def obstacle(self, versions: Versions) -> str | None:
        """Return why it may not be given a request that takes these versions, or None if it may."""
        if not self.in_service:
            return self.reason
        return None if self.version in versions else f"serves weights {self.version}; {versions} are needed"

    @contextmanager
    def working_on(self, task: asyncio.Task, flight: _Flight) -> Iterator[None]:
        """Count a request among those that it works on, and the time for which it has any."""
        if not self.flight:
            self.busy_since = time.monotonic()
        self.flight[task] = flight
        try:
            yield
        finally:
            del self.flight[task]
            if not self.flight:
                self.busy_s += time.monotonic() - self.busy_since

    def busy_until_now(self) -> float:
        """Return the seconds in which it has had requests so far."""
        return self.busy_s + (time.monotonic() - self.busy_since if self.flight else 0.0)

    def is_stuck(self, progress: Hashable, silent_s: float) -> bool:
        """Note the engine's progress; return whether it has had requests for `silent_s` without producing a token."""
        now = time.monotonic()
        if progress is None or progress != self.progress or not self.flight:
            self.progress, self.progressed = progress, now
        return now - self.progressed > silent_s


class EnginePool:
    """Watches engines and routes requests to them. Made once by the coordinator and by an evaluation.

    Requests are sent inside `serving` only, which may be entered several times at once.
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
        self._users = 0
        self._watch: asyncio.Future | None = None
        self._changed = asyncio.Event()
        self.retried = 0
        """Number of requests that were sent again, to another engine or to one that had come back."""

    @property
    def size(self) -> int:
        """Number of engines in all."""
        return len(self._servers)

    def in_service(self, versions: Versions) -> int:
        """Return the number of engines that may be asked for these versions."""
        return sum(server.obstacle(versions) is None for server in self._servers)

    @property
    def busy_s(self) -> float:
        """Seconds in which engines have had requests so far, on average over the engines."""
        return sum(server.busy_until_now() for server in self._servers) / max(1, self.size)

    @asynccontextmanager
    async def serving(self, versions: Versions) -> AsyncIterator[Sampler]:
        """Give a sampler whose requests take these versions of the weights, and watch the engines while the context lasts.

        It is entered when every engine that is in service has answered or is late, so that the first requests are spread over
        all of them.
        """
        self._users += 1
        if self._watch is None:
            self._watch = asyncio.gather(*map(self._keep_asking, self._servers))
        try:
            for server in self._servers:
                server.heard.clear()
                server.ask_now.set()
            await asyncio.gather(*(server.heard.wait() for server in self._servers if server.in_service))
            yield _VersionSampler(self, versions)
        finally:
            self._users -= 1
            if not self._users:
                await self._stop_asking()

    async def _stop_asking(self) -> None:
        watch, self._watch = self._watch, None
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.engine.close()

    async def place(self, request: SamplingRequest, versions: Versions, home: int | None) -> int:
        """Return the index of the engine for a request; where none may be asked, wait for one to come back.

        Raises:
            DeadlineError: none came back within `Patience.return_s`; says what was wrong with each.
        """
        deadline = time.monotonic() + self._patience.return_s
        while True:
            chosen = choose([server.load(versions) for server in self._servers], home, MARGIN * _size(request))
            if chosen is not None:
                return chosen
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise DeadlineError(
                    f"no engine in service for {self._patience.return_s:g} s: "
                    + "; ".join(f"{server.engine.url} is out ({server.obstacle(versions)})" for server in self._servers)
                ) from None

    async def ask(self, index: int, request: SamplingRequest, versions: Versions) -> list[Sample]:
        """Sample on one engine.

        Raises:
            RequestAborted: new weights ended the request (`transfer.in_flight`); the engine is well.
            EngineError: the engine failed, which takes it out of service, or was taken out by somebody else meanwhile.
            DeadlineError: the answer did not come in time.
        """
        server = self._servers[index]
        task = asyncio.create_task(server.engine.generate(replace(request, version=server.version)))
        with server.working_on(task, _Flight(_size(request), versions)):
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()
        if task.cancelled():
            raise EngineError(f"engine {server.engine.url} was taken out: {server.reason}")
        try:
            samples = task.result()
            used = {version for sample in samples for version, _ in sample.spans}
            if wrong := sorted(version for version in used if version not in versions):
                raise EngineError(f"engine {server.engine.url} sampled with weights {wrong}; the batch needs {versions}")
        except RequestAborted:
            raise
        except EngineError as error:
            self._take_out(server, str(error))
            raise
        server.served = server.progressed = time.monotonic()
        return samples

    async def _keep_asking(self, server: _Server) -> None:
        while True:
            server.ask_now.clear()
            await self._look_after(server)
            server.heard.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.ask_now.wait(), self._period_s)

    async def _look_after(self, server: _Server) -> None:
        """Ask an engine whether it is well and which weights it serves; take it out of service or put it in accordingly."""
        was_out, asked = not server.in_service, time.monotonic()
        try:
            version, progress = await self._answer(server)
        except DeadlineError as error:
            if server.served < asked:  # else it has finished a request since: it is late, but works
                self._give_up(server, str(error))
        except EngineError as error:
            self._take_out(server, str(error))
        else:
            if was_out:  # one that was in when it was asked may have failed a request since, which counts more
                self._put_in(server)
            self._note_version(server, version)
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
        for task in server.flight:
            task.cancel()

    def _put_in(self, server: _Server) -> None:
        logger.warning("engine %s is in service again", server.engine.url)
        server.in_service = True
        self._note_change()

    def _note_version(self, server: _Server, version: int | None) -> None:
        """Note the weights that an engine serves; requests that do not take them go elsewhere."""
        if version == server.version:
            return
        server.version = version
        self._note_change()
        misplaced = [task for task, flight in server.flight.items() if version not in flight.versions]
        if misplaced:
            server.reason = f"serves weights {version}"
            logger.warning("engine %s serves weights %s: %d requests go elsewhere", server.engine.url, version, len(misplaced))
        for task in misplaced:
            task.cancel()

    def _note_change(self) -> None:
        """Wake whoever waits for an engine that may be asked."""
        self._changed.set()
        self._changed = asyncio.Event()


class _VersionSampler:
    """Sends the requests of one batch or evaluation to engines of a pool; implements `types.Sampler`."""

    def __init__(self, pool: EnginePool, versions: Versions) -> None:
        self._pool, self._versions = pool, versions
        self._homes: dict[tuple[int, ...], int] = {}

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt on the engine that `choose` chooses; if the request fails there, send it to another one, with the
        same seeds, which give the same samples if engines heed them (`rollout.seeded`).

        Raises:
            EngineError: the request failed `TRIES` times; carries the reason of each.
            DeadlineError: an engine did not answer in time, or none was in service for too long; names who and why.
        """
        failed: list[str] = []
        prompt = tuple(request.tokens)
        while True:
            engine = await self._pool.place(request, self._versions, self._homes.get(prompt))
            self._homes[prompt] = engine
            try:
                return await self._pool.ask(engine, request, self._versions)
            except EngineError as error:
                failed.append(str(error))
            if len(failed) == TRIES:
                raise EngineError(f"a request failed {TRIES} times: " + "; then ".join(failed))
            self._pool.retried += 1


async def _question(engine: Engine) -> tuple[int | None, Hashable]:
    await engine.health()
    return await engine.version(), await engine.progress()


def _size(request: SamplingRequest) -> int:
    """Return the most tokens that a request may come to."""
    return len(request.tokens) + request.samples * request.max_tokens
