"""Rank 0 brings all engines to a version at the same time, through their control planes; every rank sends its messages."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_hpt.errors import EngineGone, HptError
from megatron_hpt.transfer.control import EngineControl, Memory
from megatron_hpt.transfer.sending.group import TrainerGroup
from megatron_hpt.transfer.sending.options import Target, TransferOptions
from megatron_hpt.transfer.sending.routes import Routes
from megatron_hpt.transfer.sending.staging import StagedVersion
from megatron_hpt.transfer.transports import TRANSPORTS, Messages, Sink

logger = logging.getLogger(__name__)
Rendezvous = dict[str, Any]


class EngineDriver:
    """All engines, driven by rank 0; every rank sends its own messages. Engines are named by their place in `targets`."""

    def __init__(
        self,
        group: TrainerGroup,
        targets: Sequence[Target],
        options: TransferOptions,
        routes: Routes,
        sink: Sink | Messages,
    ) -> None:
        self.targets, self.engines = targets, range(len(targets))
        self._group, self._options, self._sink = group, options, sink
        self._talks = TRANSPORTS[options.transport].meets
        self._contents = [routes.contents(engine) for engine in self.engines]
        self._messages = {engine: routes.messages(engine) for engine in self.engines if self._talks}
        self._listeners: dict[int, socket.socket] = {}
        self.prepared: set[int] = set()
        """Engines that have agreed on their contents, and have since met no error."""
        self.staged: StagedVersion | None = None
        """The version that engines are brought to; the sender sets it."""

    def bring(self, engines: Sequence[int]) -> dict[str, float]:
        """Bring those of the engines that are there to the staged version; collective.

        Returns:
            On rank 0 the seconds of each step of the slowest engine.

        Raises:
            HptError: on every rank, what an engine or a rank that talked to it met. An engine that is gone is left out.
        """
        # Rank 0 alone has connections: it decides for all whom they serve, or some would wait for an engine that is not there.
        meetings = self._group.broadcast(
            self._group.collectively(lambda: self._look(engines) if self._group.is_first else None)
        )
        seconds: dict[int, dict[str, float]] = {}
        driven = meetings if self._group.is_first else {}
        # An engine answers its control plane only when all messages have reached it, so both must go on at once, and all
        # engines at once: a rank that served them one after the other would wait for the slowest, others for that rank.
        with ThreadPoolExecutor(max(1, 2 * len(meetings))) as pool:
            talks = [pool.submit(self._group.attempt, partial(self._talk, *meeting)) for meeting in meetings.items()]
            drives = [pool.submit(self._group.attempt, partial(self._drive, *m, seconds)) for m in driven.items()]
            talked = [talk.result() for talk in talks]
            answered = [drive.result() for drive in drives]
        everyone = self._group.gather((answered, talked))
        # What the engine says comes first: it knows more than a rank whose message was not taken.
        outcomes = [everyone[0][0], *(met for _, met in everyone)]
        for engine, *errors in zip(meetings, *outcomes, strict=True):
            error = next(filter(None, errors), None)
            # After an error nobody knows what the engine holds or where its group stands: it is prepared again.
            (self.prepared.discard if error else self.prepared.add)(engine)
            if isinstance(error, EngineGone):
                self._note_gone(engine, error)
            elif error is not None:
                raise error
        slowest: dict[str, float] = {}
        for step, value in itertools.chain(*(steps.items() for steps in seconds.values())):
            slowest[step] = max(value, slowest.get(step, 0.0))
        return slowest

    def _look(self, engines: Sequence[int]) -> dict[int, Rendezvous | None]:
        """Engines that are there and lack the version → where to meet; None: prepared, and serving the one before."""

        def version_of(engine: int) -> int | EngineGone | None:
            try:
                return self.targets[engine].control.version()
            except EngineGone as error:
                return error

        with ThreadPoolExecutor(max(1, len(engines))) as pool:
            versions = dict(zip(engines, pool.map(version_of, engines), strict=True))
        meetings: dict[int, Rendezvous | None] = {}
        for engine, version in versions.items():
            if isinstance(version, EngineGone):
                self._note_gone(engine, version)
            elif version is None or engine not in self.prepared:
                meetings[engine] = self._rendezvous(engine)  # a server that was started again knows nothing
            elif version != self.staged.version:
                meetings[engine] = None
        return meetings

    def _rendezvous(self, engine: int) -> Rendezvous:
        if not self._talks:
            return {}
        from megatron_hpt.transfer.transports.collective import library

        # The store gets the open socket: given an address alone it would listen on all of them.
        self._listeners[engine] = socket.create_server((self._options.host, 0))
        return {
            "host": self._options.host,
            "port": self._listeners[engine].getsockname()[1],
            "senders": self._group.size,
            "size": self._group.size + self.targets[engine].layout.ranks,
            "seconds": self._options.deadline_s,
            "library": library(self._options.transport),
        }

    def _talk(self, engine: int, rendezvous: Rendezvous | None) -> None:
        """Send this rank's messages to one engine; meet it first where it is new."""
        if self._talks:
            if rendezvous:
                self._sink.meet(engine, rendezvous, self._group.rank, self._listeners.pop(engine, None))
            self._sink.transmit(engine, self._messages[engine])

    def _drive(self, engine: int, rendezvous: Rendezvous | None, seconds: dict[int, dict[str, float]]) -> None:
        """Have one engine take in the version; rank 0 only."""
        control, options = self.targets[engine].control, self._options
        if options.sleep:
            control.wake(Memory.WEIGHTS)
        fresh = rendezvous is not None
        if fresh:
            self._contents[engine] = replace(self._contents[engine], rendezvous=rendezvous)
            control.prepare(self._contents[engine])
        compare = fresh or options.sleep or self.staged.version % options.compare_every == 0
        seconds[engine] = control.update(self.staged.manifest(self._contents[engine], compare=compare))
        if not options.sleep:  # else caches have no memory yet: `let_sample` comes when the trainer has given its own back
            control.resume()

    def renew(self, url: str) -> None:
        """Bring the engine at this address, which was started again, to the staged version, if there is one; collective.

        Raises:
            HptError: as `bring`.
        """
        engines = [engine for engine in self.engines if self.targets[engine].control.url == url]
        for engine in engines:
            self.targets[engine].control.note_restart()
        if self.staged is not None:  # else it gets its first version with all others
            self.bring(engines)
            self.let_sample(engines)

    def sleep(self) -> None:
        """Have all engines give their memory away, where they sleep at all; collective.

        Raises:
            HptError: on every rank, what an engine answered.
        """
        if self._options.sleep:
            self._all_at_once(self.engines, lambda control: control.sleep())

    def let_sample(self, engines: Sequence[int]) -> None:
        """Have engines that have the staged version take memory for caches, and sample, where they sleep at all; collective.

        Raises:
            HptError: as `sleep`.
        """

        def take_and_sample(control: EngineControl) -> None:
            control.wake(Memory.CACHE)
            control.resume()

        if self._options.sleep:
            self._all_at_once([engine for engine in engines if engine in self.prepared], take_and_sample)

    def _all_at_once(self, engines: Sequence[int], action: Callable[[EngineControl], None]) -> None:
        """Have rank 0 do something with all engines that are there, while the other ranks wait for the outcome."""

        def with_engine(engine: int) -> HptError | None:
            error = self._group.attempt(lambda: action(self.targets[engine].control))
            if isinstance(error, EngineGone):
                self._note_gone(engine, error)
                return None
            return error

        def with_engines() -> None:
            with ThreadPoolExecutor(max(1, len(engines))) as pool:
                for error in list(pool.map(with_engine, engines)):
                    if error is not None:
                        raise error

        self._group.collectively(with_engines if self._group.is_first else lambda: None)

    def _note_gone(self, engine: int, error: EngineGone) -> None:
        self.prepared.discard(engine)
        if self._group.is_first:
            version = self.staged.version if self.staged else None
            url = self.targets[engine].control.url
            logger.warning("engine %s is gone, version %s goes on without it: %s", url, version, error)
