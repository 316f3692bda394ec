"""The parent's side of grader processes: jobs go out in bunches, grades come back one by one, each with a deadline.

A thread stands before each process, so that jobs may be given from any thread and any event loop. Since every answer is
accounted for when it is done, a process that hangs costs the answer that it was at; so does one that dies, if a second one
dies of the same answer. The rest of the bunch goes on in another one. (Pools that know only whole tasks, such as pebble's, have
to grade a bunch again to find the culprit.)
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field

from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards.grades import Answer, Cause, Grade, ungraded
from megatron_hpt.rewards.worker import receive, send

_START_S = 120.0
"""For the imports of a nursery on a cold disk."""
_GRACE_S = 0.5
"""From a grader's own alarm to its death."""
_BUNCH = 32
"""Jobs at most in one message: enough to make messages cheap, few enough to share out a batch."""


@dataclass(frozen=True)
class GradingJob:
    """An answer that waits for a grade of one reward."""

    reward: str
    answer: Answer
    grade: Future[Grade] = field(default_factory=Future)

    def done(self, grade: Grade) -> None:
        """Hand it in; whoever waited may have gone."""
        with contextlib.suppress(Exception):
            self.grade.set_result(grade)


class _Nursery:
    """The process that graders are forked from; another one if it died."""

    def __init__(self, settings: RewardConfig) -> None:
        self._settings, self._lock = settings, threading.Lock()
        self._start()

    def _start(self) -> None:
        # Graders are killed in the middle of their work: what they had written goes with this process.
        self._own = tempfile.TemporaryDirectory(prefix="hpt-graders-", ignore_cleanup_errors=True)
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-m", "megatron_hpt.rewards.worker", str(theirs.fileno())]
        with theirs:
            environment = {**os.environ, "TMPDIR": self._own.name}
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        self._control.settimeout(_START_S)
        try:
            send(self._control, self._settings.model_dump(mode="json"))
            answer = receive(self._control)
        except (EOFError, OSError) as error:
            raise ConfigError(f"the grader processes do not start: {type(error).__name__} {error}; see the log") from None
        if "refused" in answer:
            raise ConfigError(answer["refused"])

    def grader(self) -> _Grader:
        """A new process."""
        with self._lock:
            try:
                return self._fork()
            except (EOFError, OSError):
                self.close()
                self._start()
                return self._fork()

    def _fork(self) -> _Grader:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        ours.settimeout(_START_S)
        return _Grader(ours, receive(ours))

    def close(self) -> None:
        """End it; graders that are at work die with it."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._own.cleanup()


class _Grader:
    """One process."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection, self._pid = connection, pid
        self.suspect: GradingJob | None = None
        """The job that it was at when it died."""

    def grade(self, jobs: deque[GradingJob], deadline_s: float, suspect: GradingJob | None = None) -> bool:
        """Grade jobs and take them off; False if the process is lost.

        The job that it was at is taken off too, if it took too long, or if it is the suspect, with which another process has
        died: one that was killed from outside changes no grade.
        """
        try:
            self._connection.settimeout(deadline_s + _GRACE_S)
            send(self._connection, [(job.reward, astuple(job.answer)) for job in jobs])
            while jobs:
                score, cause, detail = receive(self._connection)
                jobs.popleft().done(Grade(score, cause and Cause(cause), detail))
            return True
        except TimeoutError:
            jobs.popleft().done(ungraded(Cause.DEADLINE, f"not done in {deadline_s:g} s; its process was killed"))
        except (EOFError, OSError):
            if jobs[0] is suspect:
                jobs.popleft().done(ungraded(Cause.CRASH, "its process died, and so did another one"))
            else:
                self.suspect = jobs[0]
        self.kill()
        return False

    def kill(self) -> None:
        """End it and what it has started."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)


class GraderProcesses:
    """`settings.workers` processes and the threads before them."""

    def __init__(self, settings: RewardConfig) -> None:
        """
        Raises:
            ConfigError: a reward cannot be made.
        """
        self._settings = settings
        self._nursery = _Nursery(settings)
        self._bunches: queue.SimpleQueue[deque[GradingJob] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(settings.workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Iterable[tuple[str, Answer]]) -> list[Future[Grade]]:
        """Grade answers; the futures are in order. Neighbours go to the same process, which remembers what it has parsed."""
        todo = [GradingJob(reward, answer) for reward, answer in jobs]
        size = max(1, min(_BUNCH, -(-len(todo) // (4 * self._settings.workers))))
        for start in range(0, len(todo), size):
            self._bunches.put(deque(todo[start : start + size]))
        return [job.grade for job in todo]

    def _work(self) -> None:
        grader: _Grader | None = None
        suspect: GradingJob | None = None
        while (jobs := self._bunches.get()) is not None:
            while jobs and not self._closed:
                try:
                    grader = grader or self._nursery.grader()
                except Exception as error:  # the machine is out of processes or memory; the answers say so
                    jobs.popleft().done(ungraded(Cause.CRASH, f"no grader process: {error}"))
                    continue
                if not grader.grade(jobs, self._settings.deadline_s, suspect):
                    grader, suspect = None, grader.suspect
            for job in jobs:
                job.done(ungraded(Cause.CRASH, "the graders were closed"))
        if grader:
            grader.kill()

    def close(self) -> None:
        """End everything; what is not graded by then stays ungraded."""
        self._closed = True
        self._nursery.close()
        for _ in self._threads:
            self._bunches.put(None)
        for thread in self._threads:
            thread.join()
