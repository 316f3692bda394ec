"""The supervisor starts engines, trainer and coordinator, shows progress, and ends everything when one part dies."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_hpt.blackboard import NOTICE, Blackboard
from megatron_hpt.config import Config
from megatron_hpt.errors import DeadlineError, HptError, Interrupted, RequeueRequested
from megatron_hpt.launch.children import Child, Failure, describe_exit, failure_of
from megatron_hpt.launch.engine_fleet import Fleet, provide_token
from megatron_hpt.launch.launchers import Launcher
from megatron_hpt.launch.starting import Starting
from megatron_hpt.run import RunDir
from megatron_hpt.space import NoSpaceError, describe, full
from megatron_hpt.telemetry import metrics
from megatron_hpt.telemetry.progress import Progress

POLL_S = 0.2
SETTLE_S = 1.5
"""Seconds without another failure after which all failures of one cause have shown; they are reported together."""


class RunFailed(HptError):
    """A process of the run died; the message names it."""


class Supervisor:
    """Supervises one run; `run` is called once."""

    def __init__(self, config: Config, run: RunDir, start: int, launcher: Launcher) -> None:
        self._config, self._run, self._start, self._launcher = config, run, start, launcher
        self._board = Blackboard.host(launcher.host)
        self._parts: list[Child] = []
        """Trainer and coordinator."""
        self._engines = Fleet()
        self._starting = Starting(config, self._board, run.logs, start)
        self._silences = 0
        """Number of engines that the coordinator has given up so far (`silent/<n>`)."""
        self._granted = 0
        """Number of dead engines that the trainer has made room for so far (`wanted/<n>` → `granted/<n>`)."""
        self._returned = 0
        """Number of engines that answer again, so far (`returned/<n>`)."""
        self._shown = start
        self._read = 0
        self._before = self._metrics_file
        """Inode of the metrics when this run began. While it is the same, lines of steps to come are of the run before."""
        self._noticed: float | None = None
        self._notice = ""

    def run(self) -> None:
        """Start all parts and return when trainer and coordinator have finished. Whatever is raised, no process is left.

        Raises:
            RunFailed: a process died.
            NoSpaceError: a process died because a disk is full.
            Interrupted: SIGINT came, or a second notice.
            RequeueRequested: SIGTERM or SIGUSR1 came, and the trainer has saved what it had trained or ran out of time for it.
            DeadlineError: a part was not ready in time, or an engine that was started again.
        """
        handlers = {signal.SIGINT: _interrupt, signal.SIGTERM: self._take_notice, signal.SIGUSR1: self._take_notice}
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            with Progress(self._config.trainer.steps, self._start) as progress:
                self._start_all()
                self._watch(progress)
        finally:
            for number in previous:
                signal.signal(number, signal.SIG_IGN)
            self._launcher.stop(self._children)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_all(self) -> None:
        provide_token()
        if not self._config.rollout.urls:
            self._engines.start(self._config.rollout.servers, self._launcher.engine)
        arguments = [str(self._run.path), "--store", self._board.address, "--from-step", str(self._start)]
        self._parts.append(self._launcher.trainer(arguments))
        self._parts.append(self._launcher.coordinator(arguments))

    @property
    def _children(self) -> list[Child]:
        return [*self._engines.values(), *self._parts]

    def _watch(self, progress: Progress) -> None:
        """Watch all parts, and return when trainer and coordinator have ended well."""
        while not self._finished():
            if self._noticed is not None:
                self._end_if_saved()
            self._start_granted()
            self._end_unresponsive(progress)
            self._check_children(progress)
            if self._starting.announced:
                self._announce_returned(progress)
            self._show(progress)
            time.sleep(POLL_S)
        self._show(progress)

    def _take_notice(self, number: int, _: Any) -> None:
        """Handle a scheduler's notice: `_watch` has the trainer save. A second notice ends the run without waiting for that."""
        if self._noticed is not None:
            _interrupt(number, _)
        self._noticed, self._notice = time.monotonic(), signal.Signals(number).name

    def _end_if_saved(self) -> None:
        """Pass a notice on to the trainer, and end the run when its checkpoint and the last line of metrics are written.

        Raises:
            RequeueRequested: they are written, or took too long, or nothing has been trained yet.
        """
        if self._board.get(NOTICE) is None:
            self._board.put(NOTICE, True)
        stopped = self._board.get("stopped")
        if not self._starting.over:
            raise RequeueRequested(f"ended by {self._notice} before training; continue with --resume")
        if stopped is not None and len(self._lines()) >= stopped:
            raise RequeueRequested(f"ended by {self._notice} after step {stopped}, which is saved; continue with --resume")
        if time.monotonic() - self._noticed > self._config.deadlines.notice_s:
            raise RequeueRequested(
                f"ended by {self._notice}; no checkpoint within {self._config.deadlines.notice_s:.0f} s (deadlines.notice_s), "
                "the last one counts; continue with --resume"
            )

    def _finished(self) -> bool:
        return all(child.exit_code == 0 for child in self._parts)

    def _check_children(self, progress: Progress) -> None:
        """Start engines again that died in service, as often as `rollout.max_restarts` allows.

        Raises:
            RunFailed: another part died, or too many engines did.
            NoSpaceError: that happened because a disk is full.
        """
        failures, deadline = self._failures(), time.monotonic() + 4 * SETTLE_S
        if not failures:
            return
        settled = 0
        while len(failures) > settled and time.monotonic() < deadline:
            settled = len(failures)
            time.sleep(SETTLE_S)
            failures = self._failures()
        dead = self._engines.dead()
        # An engine that never answered will not do so after a restart either.
        allowed = self._config.rollout.max_restarts if self._starting.announced else 0
        if len(dead) < len(failures) or self._engines.restarts + len(dead) > allowed:
            self._blame_space(failures)
            raise RunFailed("\n".join(map(str, failures)) + self._engines.history)
        for url in dead:
            self._restart(url, progress)

    def _blame_space(self, failures: Sequence[Failure]) -> None:
        """Blame a full disk for failures where there is one, because the logs may have had no room to say so.

        Raises:
            NoSpaceError: a disk is full, or a part ended with this error.
        """
        reported = any(failure.exit_code == NoSpaceError.EXIT_CODE for failure in failures)
        places = (self._run.path, Path(tempfile.gettempdir()))
        reason = next(filter(None, map(full, places)), describe(self._run.path) if reported else None)
        if reason is not None:
            raise NoSpaceError("\n".join([reason, *map(str, failures)]))

    def _restart(self, url: str, progress: Progress) -> None:
        """Start an engine again: at once, or, if it shares the trainer's GPUs, when the trainer has made room for it."""
        child = self._engines[url]
        self._engines.restarts += 1
        died = f"{child.name} died ({describe_exit(child.exit_code)})"
        count = f"restart {self._engines.restarts} of {self._config.rollout.max_restarts}"
        # An engine that dies while it starts again has been given memory already, and the trainer waits for it.
        if self._config.rollout.sleep and url not in self._engines.returning:
            self._board.put(f"wanted/{self._granted + len(self._engines.waiting)}", url)
            self._engines.waiting.append(url)
            progress.status(f"{died} and is started again when the trainer's GPUs are free; {count}")
        else:
            self._engines.start_again(url)
            progress.status(f"{died} and is started again; {count}")

    def _start_granted(self) -> None:
        """Start the dead engines that the trainer has made room for."""
        while self._engines.waiting and self._board.get(f"granted/{self._granted}"):
            self._granted += 1
            self._engines.start_again(self._engines.waiting.pop(0))

    def _end_unresponsive(self, progress: Progress) -> None:
        """End engines that listen no more or that the coordinator has given up; `_check_children` then starts them again."""
        if not self._starting.announced:
            return
        ended = [(url, "listens no more") for url in self._engines.not_listening()]
        if (silent := self._board.get(f"silent/{self._silences}")) is not None:
            self._silences += 1
            waited = f"{self._config.deadlines.silent_s:g} s (deadlines.silent_s)"
            ended += [(silent, f"gave no sign of life for {waited}")] if silent in self._engines.serving else []
        for url, reason in ended:
            progress.status(f"{self._engines[url].name} {reason} and is ended")
            self._engines.end(url)

    def _failures(self) -> list[Failure]:
        # An engine may not end while the run goes on, not even with exit code 0.
        ended = [self._engines[url] for url in self._engines.dead()]
        ended += [part for part in self._parts if part.exit_code]
        return [failure_of(child, self._run.logs) for child in ended]

    def _announce_returned(self, progress: Progress) -> None:
        """Ask the trainer to give its weights to engines that answer again after a restart.

        Raises:
            DeadlineError: an engine has not answered within `deadlines.startup_s` of its restart.
        """
        for url, waited in self._engines.returned().items():
            self._board.put(f"returned/{self._returned}", url)
            self._returned += 1
            progress.status(f"{self._engines[url].name} answers again, after {waited:.0f} s")
        for url, started in self._engines.returning.items():
            child, waited = self._engines[url], time.monotonic() - started
            if waited > self._config.deadlines.startup_s:
                raise DeadlineError(
                    f"{child.name} not ready again within {waited:.0f} s (deadlines.startup_s); see {child.log}"
                )

    @property
    def _metrics_file(self) -> int | None:
        return self._run.metrics.stat().st_ino if self._run.metrics.is_file() else None

    def _lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics that belong to this run."""
        lines = metrics.read(self._run.metrics)
        return [line for line in lines if line["step"] < self._start] if self._metrics_file == self._before else lines

    def _show(self, progress: Progress) -> None:
        size = self._run.metrics.stat().st_size if self._run.metrics.is_file() else 0
        lines = self._lines() if size != self._read else []
        self._read = size
        for line in lines:
            if line["step"] >= self._shown:
                progress.step(line)
                self._shown = line["step"] + 1
        if self._shown == self._start:
            named = {url: url for url in self._config.rollout.urls} or self._engines.names
            progress.status(self._starting.look(named) or "first evaluation and rollouts")
        elif status := self._board.get("status/coordinator"):
            progress.status(status)


def _interrupt(number: int, _: Any) -> NoReturn:
    raise Interrupted(f"ended by {signal.Signals(number).name}")
