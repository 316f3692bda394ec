"""``python -m megatron_hpt.launch.custodian FOLDER``: removes what one supervisor's processes leave behind, and outlives it.

Engines leave files in /dev/shm: SGLang its load figures and semaphores each time, either engine more when it is killed; who is
killed cannot clean up, and a supervisor neither. So this process, which a terminal's signals do not reach, notes what those of
whose temporary files FOLDER is have mapped, and removes what nobody has mapped any more. When the supervisor is gone (the end
of its standard input) it ends who is left and removes the folder too. Were it killed itself, the next supervisor would, by its
notes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.launch.children import processes, shared_memory

NOTES = "shared.json"
"""In the folder: names in /dev/shm that its processes have mapped."""
LOCK = "lock"
"""In the folder: whoever holds it sees to the folder. Process ids say nothing where containers share /tmp."""
_SHARED = Path("/dev/shm")
_LOOK_S, _SCAN_S = 0.1, 1.0
"""Between two looks whether anything has changed in /dev/shm, and between two at the processes."""
_LOOKS = 3
_UNUSED_S = 3.0
"""A file that nobody has mapped for so long, and whose users are gone, was left behind."""
GRACE_S = 12.0
"""For processes that a dead supervisor's end has reached by its signal; engines remove their own files in it."""
_REMOVAL_S = 5.0


@dataclass(frozen=True)
class Process:
    """One that lives; a number that is used again is another one."""

    pid: int
    started: int
    """Clock ticks after the machine's start."""
    parent: int
    session: int


class Custodian:
    """Knows the processes of one folder, and what they have mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._members: dict[int, Process] = {}
        self._strangers: Counter[Process] = Counter()
        """How often each was looked at: between fork and exec a process has its parent's environment."""
        self._users: dict[Path, set[Process]] = {}
        self._unused: dict[Path, float] = {}
        """File that nobody uses → since when."""

    def scan(self) -> None:
        """Look at all processes, and note what is new."""
        alive = list(filter(None, map(process, processes())))
        here = set(alive)
        self._members = {pid: member for pid, member in self._members.items() if member in here}
        self._strangers = Counter({one: seen for one, seen in self._strangers.items() if one in here})
        for one in alive:
            if self._members.get(one.pid) != one and self._strangers[one] < _LOOKS:
                if self._belongs(one):
                    self._members[one.pid] = one
                else:
                    self._strangers[one] += 1
        before = set(self._users)
        for member in self._members.values():
            for path in shared_memory(member.pid):
                self._users.setdefault(path, set()).add(member)
        if before != set(self._users):
            self._write()

    @property
    def members(self) -> list[int]:
        """Processes of the folder that lived at the last scan."""
        return list(self._members)

    def remove_unused(self, after_s: float) -> bool:
        """Remove files whose users are gone and that nobody has mapped for a while; whether any are left."""
        suspects = {path for path, users in self._users.items() if not any(process(user.pid) == user for user in users)}
        mapped = mapped_by_anybody() if suspects else set()
        now = time.monotonic()
        self._unused = {path: self._unused.get(path, now) for path in suspects - mapped}
        removed = [path for path, since in self._unused.items() if now - since >= after_s]
        for path in removed:
            path.unlink(missing_ok=True)
            del self._unused[path], self._users[path]
        if removed:
            self._write()
        return bool(self._users)

    def _belongs(self, one: Process) -> bool:
        """By its parent, its session or its environment; titles that engines give themselves overwrite the last."""
        if one.parent in self._members or one.session in self._members:
            return True
        with contextlib.suppress(OSError):
            return f"TMPDIR={self._folder}".encode() in Path(f"/proc/{one.pid}/environ").read_bytes().split(b"\0")
        return False

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, or the folder is gone
            temporary = self._folder / f".{NOTES}"
            temporary.write_text(json.dumps(sorted(path.name for path in self._users)), encoding="utf-8")
            temporary.replace(self._folder / NOTES)


def mapped_by_anybody() -> set[Path]:
    """Files of /dev/shm that some process has mapped."""
    return set().union(*map(shared_memory, processes()))


def remove_noted(folder: Path) -> None:
    """What the processes of a dead supervisor have mapped, and nobody has any more."""
    with contextlib.suppress(OSError, ValueError):
        noted = {_SHARED / Path(name).name for name in json.loads((folder / NOTES).read_text(encoding="utf-8"))}
        for path in noted - mapped_by_anybody() if noted else ():
            path.unlink(missing_ok=True)


def process(pid: int) -> Process | None:
    """What the kernel says of a process; None: it has ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        words = stat.rpartition(")")[2].split()  # proc_pid_stat(5), from the third field on
        return Process(pid, int(words[19]), int(words[1]), int(words[3])) if words[0] not in "ZX" else None
    return None


def _watch(custodian: Custodian) -> None:
    """Until the supervisor is gone."""
    changed, scanned = None, 0.0
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        stamp, now = _SHARED.stat().st_mtime_ns, time.monotonic()
        if stamp != changed or now - scanned > _SCAN_S:
            changed, scanned = stamp, now
            custodian.scan()
            custodian.remove_unused(_UNUSED_S)


def _finish(custodian: Custodian) -> None:
    """End who is left, after a while; remove what they leave."""
    custodian.scan()
    deadline = time.monotonic() + GRACE_S
    while custodian.members and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        custodian.scan()
    for pid in custodian.members:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _REMOVAL_S
    while custodian.remove_unused(0.0) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    custodian = Custodian(folder)
    _watch(custodian)
    with contextlib.suppress(OSError), (folder / LOCK).open("r+", encoding="utf-8") as lock:
        with contextlib.suppress(BlockingIOError):  # the supervisor's, who waits for this process
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _finish(custodian)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
