"""The processes of a run: started in sessions of their own, watched, and ended so that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.launch import causes

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL: vLLM needs some to remove its own shared memory."""
_LONGEST_LOG = 64 * 2**20
"""Most bytes of a log that are read."""
TRACKERS_S = 5.0
"""Seconds that resource trackers have to remove the shared memory of processes that were killed."""


@dataclass
class Child:
    """One started process, the leader of its own session and process group."""

    name: str
    """Name in messages, e.g. ``engine 0``."""
    process: subprocess.Popen
    log: Path
    log_starts: dict[Path, int]
    """Size of each log in the folder when the process started: a resumed run appends to the logs of the run before."""
    command: Sequence[str]
    environment: dict[str, str] | None

    @classmethod
    def start(cls, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Child:
        """Start a command that logs to a file and dies with this process.

        Args:
            environment: the whole environment; None inherits that of this process.
        """
        launcher = [sys.executable, "-m", "megatron_hpt.process", str(log), *command]
        log_starts = {path: path.stat().st_size for path in log.parent.glob("*.log")}
        process = subprocess.Popen(launcher, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(name, process, log, log_starts, command, environment)

    def again(self) -> Child:
        """End what is left of this process's group, and start the same command with the same environment."""
        stop_all([self])
        return Child.start(self.name, self.command, self.log, self.environment)

    @property
    def output(self) -> str:
        """The text that the process has logged since its start."""
        return said(self.log, self.log_starts.get(self.log, 0))

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self.process.poll()

    def signal_group(self, number: int) -> bool:
        """Send a signal to the whole process group; return False if no process is left in it."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True)
class Failure:
    """A process that ended too early or badly; as text, the cause and the last lines of its log."""

    name: str
    exit_code: int
    log: Path
    log_start: int = 0
    """Byte of the log at which this process began to write."""

    def __str__(self) -> str:
        died = f"{self.name} died ({describe_exit(self.exit_code)})"
        why = causes.of_exit(self.exit_code) or causes.cause(said(self.log, self.log_start))
        return f"{died}{f': {why}{chr(10)}' if why else '; '}the last lines of {self.log}:\n{tail(self.log)}"


def said(log: Path, start: int = 0) -> str:
    """Return the text of a log from a byte on; of a very long one its beginning."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read(_LONGEST_LOG).decode(errors="replace")


def describe_exit(code: int) -> str:
    """Name an exit code and, if there is one, its signal."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"exit code {code}, {signal.Signals(-code).name}"
    return f"exit code {code}"


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, indented."""
    if not log.is_file():
        return "    (no log)"
    text = log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    return "\n".join(f"    {line}" for line in text[-lines:])


_ROOT_CAUSES = (
    re.compile(r"Root Cause.*?rank\s*:\s*(?P<rank>\d+) \(local_rank.*?exitcode\s*:\s*(?P<code>-?\d+)", re.DOTALL),
    # Slurm writes a line for each end of tasks, the first one first; tasks that end alike share a line.
    re.compile(r"srun: error: \S+ tasks? (?P<rank>\d+)[^:]*: (?:Exited with exit code (?P<code>\d+)|(?P<signal>[A-Z][a-z]+))"),
)
"""Messages of torchrun and srun that name the rank that failed first."""
_SIGNALS = {"Killed": -9, "Terminated": -15, "Aborted": -6, "Segmentation": -11}
"""First word of srun's message about a task that a signal ended → exit code."""


def failure_of(child: Child, logs: Path) -> Failure:
    """Describe how a child failed; of the trainer, the rank that torchrun or srun names as the root cause.

    Args:
        logs: folder of the ranks' own logs.
    """
    code = child.exit_code or 0
    named = [match for pattern in _ROOT_CAUSES if (match := pattern.search(child.output))] if child.name == "trainer" else []
    if not named:
        return Failure(child.name, code, child.log, child.log_starts.get(child.log, 0))
    cause = named[0].groupdict()
    rank, code = cause["rank"], int(cause["code"]) if cause["code"] else _SIGNALS.get(cause["signal"], code)
    log = logs / f"trainer_rank{rank}.log"
    return Failure(f"trainer rank {rank}", code, log, child.log_starts.get(log, 0))


def stop_all(children: Sequence[Child], grace_s: float = GRACE_S) -> None:
    """Send SIGTERM to every child's group and SIGKILL to what is left of it after `grace_s` seconds; return when all are gone.

    Python's resource trackers are killed last, because they remove the shared memory of the processes that were killed before.
    Shared memory that they do not know (SGLang leaves its load figures behind however it ends) is removed here. Children that
    have ended are allowed.
    """
    shared = set().union(*(shared_memory(pid) for child in children for pid in members(child.process.pid)))
    alive = _left([child for child in children if child.signal_group(signal.SIGTERM)], grace_s)
    for child in alive:
        for pid in members(child.process.pid):
            if b"multiprocessing.resource_tracker" not in _command(pid):
                _kill(pid)
    for child in _left(alive, TRACKERS_S):
        child.signal_group(signal.SIGKILL)
    for child in children:
        child.process.wait()
    _remove(shared)


def _remove(paths: set[Path]) -> None:
    """Remove files once no process has them mapped: helpers that left their group, as SGLang's do, end a moment later."""
    deadline = time.monotonic() + TRACKERS_S
    while paths:
        mapped = set().union(*map(shared_memory, processes()))
        for path in paths - mapped:
            path.unlink(missing_ok=True)
        paths &= mapped
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _left(children: Sequence[Child], seconds: float) -> list[Child]:
    """Wait until the children's groups are empty, at most `seconds`; return the children whose groups are not."""
    deadline, alive = time.monotonic() + seconds, list(children)
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [child for child in alive if child.exit_code is None or child.signal_group(0)]
    return alive


def processes() -> list[int]:
    """Return the process ids of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def members(group: int) -> list[int]:
    """Return the process ids of a group."""
    pids = []
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                pids.append(pid)
    return pids


def shared_memory(pid: int) -> set[Path]:
    """Return the files of /dev/shm that a process has mapped.

    They are found by inode and not by the names in the process's map, because glibc's sem_open renames a semaphore after
    mapping it, and the map keeps the first name.
    """
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
        mapped = {int(number) for number in re.findall(r"(\d+) +/dev/shm/", maps)}
        return {Path(entry.path) for entry in os.scandir("/dev/shm") if entry.inode() in mapped} if mapped else set()
    return set()


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
