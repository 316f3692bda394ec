"""The processes of a run: started in sessions of their own, watched, and taken down without leaving any behind."""

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
"""Bytes of a log that are looked at."""
TRACKERS_S = 5.0
"""Seconds for resource trackers to remove the shared memory of processes that were killed."""


@dataclass
class Child:
    """One started process."""

    name: str
    process: subprocess.Popen
    log: Path
    log_starts: dict[Path, int]
    """Sizes of the logs beside its own, and of its own, when it started: a resumed run appends to those of the run before."""
    command: Sequence[str]
    environment: dict[str, str] | None

    @classmethod
    def start(cls, name: str, command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> Child:
        """Start a command that dies with this process and logs to a file."""
        launcher = [sys.executable, "-m", "megatron_hpt.process", str(log), *command]
        log_starts = {path: path.stat().st_size for path in log.parent.glob("*.log")}
        process = subprocess.Popen(launcher, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return cls(name, process, log, log_starts, command, environment)

    def again(self) -> Child:
        """Take down what is left of it and start the same command."""
        stop_all([self])
        return Child.start(self.name, self.command, self.log, self.environment)

    @property
    def output(self) -> str:
        """What it has logged so far."""
        return said(self.log, self.log_starts.get(self.log, 0))

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def signal_group(self, number: int) -> bool:
        """Signal the whole process group; False if nobody is left in it."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True)
class Failure:
    """A process that ended when it should not have, or as it should not have."""

    name: str
    exit_code: int
    log: Path
    log_start: int = 0
    """Where in the log its own words begin."""

    def __str__(self) -> str:
        died = f"{self.name} died ({describe_exit(self.exit_code)})"
        why = causes.of_exit(self.exit_code) or causes.cause(said(self.log, self.log_start))
        return f"{died}{f': {why}{chr(10)}' if why else '; '}the last lines of {self.log}:\n{tail(self.log)}"


def said(log: Path, start: int = 0) -> str:
    """The text of a log from a byte on, of an endless one the beginning."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read(_LONGEST_LOG).decode(errors="replace")


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"exit code {code}, {signal.Signals(-code).name}"
    return f"exit code {code}"


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    if not log.is_file():
        return "    (no log)"
    text = log.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    return "\n".join(f"    {line}" for line in text[-lines:])


_ROOT_CAUSES = (
    re.compile(r"Root Cause.*?rank\s*:\s*(?P<rank>\d+) \(local_rank.*?exitcode\s*:\s*(?P<code>-?\d+)", re.DOTALL),
    # Slurm names a task first when it was the first to end; several alike are one line.
    re.compile(r"srun: error: \S+ tasks? (?P<rank>\d+)[^:]*: (?:Exited with exit code (?P<code>\d+)|(?P<signal>[A-Z][a-z]+))"),
)
"""What torchrun and srun say of the rank that failed."""
_SIGNALS = {"Killed": -9, "Terminated": -15, "Aborted": -6, "Segmentation": -11}
"""The first word of what srun says of a task that a signal ended."""


def failure_of(child: Child, logs: Path) -> Failure:
    """What failed; of the trainer, the rank that its launcher names as the root cause."""
    code = child.exit_code or 0
    found = [match for pattern in _ROOT_CAUSES if (match := pattern.search(child.output))] if child.name == "trainer" else []
    if not found:
        return Failure(child.name, code, child.log, child.log_starts.get(child.log, 0))
    cause = found[0].groupdict()
    rank, code = cause["rank"], int(cause["code"]) if cause["code"] else _SIGNALS.get(cause["signal"], code)
    log = logs / f"trainer_rank{rank}.log"
    return Failure(f"trainer rank {rank}", code, log, child.log_starts.get(log, 0))


def stop_all(children: Sequence[Child], grace_s: float = GRACE_S) -> None:
    """SIGTERM to every group, SIGKILL to what is left of it after `grace_s` seconds.

    Python's resource trackers come last: they remove the shared memory of those that were killed. What they know nothing of
    (SGLang's load figures, which it leaves behind however it ends) is removed here.
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
    """Remove files that nobody has mapped; helpers that left the group, as SGLang's do, end a moment later."""
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
    """Those of whose groups there is somebody left after a while."""
    deadline, alive = time.monotonic() + seconds, list(children)
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = [child for child in alive if child.exit_code is None or child.signal_group(0)]
    return alive


def processes() -> list[int]:
    """All of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def members(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for pid in processes():
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                found.append(pid)
    return found


def shared_memory(pid: int) -> set[Path]:
    """Files of /dev/shm that a process has mapped.

    By their numbers, not by the names in its map: a semaphore is made under another name than the one that it stays under
    (sem_open of glibc), and the map shows the first.
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
