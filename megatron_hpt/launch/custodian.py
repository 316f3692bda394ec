"""``python -m megatron_hpt.launch.custodian FOLDER``: removes what one supervisor's processes leave behind, and outlives it.

Engines leave files in /dev/shm: SGLang always its load figures and semaphores, and either engine more when it is killed. A
process that is killed cannot clean up, and neither can a supervisor that is. So this process, which a terminal's signals do
not reach, notes the files that processes with TMPDIR=FOLDER have mapped, and removes those that no process has mapped any more.
When its standard input ends, the supervisor is gone: it then ends the processes that are left, and removes the folder too. If
it is killed itself, the next supervisor on the machine does so from its notes.
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
"""File in the folder with the names in /dev/shm that its processes have mapped."""
LOCK = "lock"
"""File in the folder whose lock says that somebody is in charge of it; process ids do not where containers share /tmp."""
_SHARED = Path("/dev/shm")
_LOOK_S, _SCAN_S = 0.1, 1.0
"""Seconds between two looks at /dev/shm for a change, and between two scans of all processes."""
_LOOKS = 3
"""Scans in which a new process may still turn out to belong to the folder."""
_YOUNG_S = 10.0
"""Seconds in which it is looked for who has mapped a new file; reading what a large process has mapped takes milliseconds."""
_UNUSED_S = 3.0
"""Seconds after which a file was left behind if its users are gone and no process has it mapped."""
GRACE_S = 12.0
"""Seconds that processes have to end after the supervisor, whose end sends them a signal; engines remove their files then."""
_REMOVAL_S = 5.0


@dataclass(frozen=True)
class Process:
    """A living process; one that gets the process id of another later is unequal to it."""

    pid: int
    started: int
    """Start in clock ticks after the machine's start."""
    parent: int
    session: int


class Custodian:
    """Knows the processes of one folder and the files in /dev/shm that they have mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._members: dict[int, Process] = {}
        self._strangers: Counter[Process] = Counter()
        """Process → scans that took it for a stranger: between fork and exec a process has its parent's environment."""
        self._users: dict[Path, set[Process]] = {}
        self._appeared: dict[Path, float] = {}
        """File in /dev/shm → time at which it was first seen."""
        self._unused: dict[Path, float] = {}
        """File that no process uses → time since when."""

    def scan(self) -> None:
        """Look at all processes, and note new ones of the folder and new files of theirs."""
        alive = list(filter(None, map(process, processes())))
        here = set(alive)
        self._members = {pid: member for pid, member in self._members.items() if member in here}
        self._strangers = Counter({stranger: scans for stranger, scans in self._strangers.items() if stranger in here})
        for candidate in alive:
            if self._members.get(candidate.pid) != candidate and self._strangers[candidate] < _LOOKS:
                if self._belongs(candidate):
                    self._members[candidate.pid] = candidate
                else:
                    self._strangers[candidate] += 1
        if self._has_young_files():
            self._note_users()

    def _has_young_files(self) -> bool:
        """Return whether a file in /dev/shm is so new that processes may yet map it."""
        now = time.monotonic()
        self._appeared = {path: self._appeared.get(path, now) for path in _SHARED.iterdir()}
        return any(now - since < _YOUNG_S for since in self._appeared.values())

    def _note_users(self) -> None:
        before = set(self._users)
        for member in self._members.values():
            for path in shared_memory(member.pid):
                self._users.setdefault(path, set()).add(member)
        if before != set(self._users):
            self._write()

    @property
    def members(self) -> list[int]:
        """Process ids of the folder at the last scan."""
        return list(self._members)

    def remove_unused(self, after_s: float) -> bool:
        """Remove files whose users are gone and that no process has had mapped for `after_s`; return whether files are left."""
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

    def _belongs(self, candidate: Process) -> bool:
        """Return whether a process belongs to the folder, by its parent, its session or its environment. The last alone would
        not do: the titles that engines give themselves overwrite it."""
        if candidate.parent in self._members or candidate.session in self._members:
            return True
        with contextlib.suppress(OSError):
            return f"TMPDIR={self._folder}".encode() in Path(f"/proc/{candidate.pid}/environ").read_bytes().split(b"\0")
        return False

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk, or the folder is gone
            temporary = self._folder / f".{NOTES}"
            temporary.write_text(json.dumps(sorted(path.name for path in self._users)), encoding="utf-8")
            temporary.replace(self._folder / NOTES)


def mapped_by_anybody() -> set[Path]:
    """Return the files of /dev/shm that some process has mapped."""
    return set().union(*map(shared_memory, processes()))


def remove_noted(folder: Path) -> None:
    """Remove files that a dead custodian had noted for a folder, unless a process still has them mapped."""
    with contextlib.suppress(OSError, ValueError):
        noted = {_SHARED / Path(name).name for name in json.loads((folder / NOTES).read_text(encoding="utf-8"))}
        for path in noted - mapped_by_anybody() if noted else ():
            path.unlink(missing_ok=True)


def process(pid: int) -> Process | None:
    """Read a process from /proc; None if it has ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        words = stat.rpartition(")")[2].split()  # proc_pid_stat(5), from the third field on
        return Process(pid, int(words[19]), int(words[1]), int(words[3])) if words[0] not in "ZX" else None
    return None


def _watch(custodian: Custodian) -> None:
    """Scan and remove until the supervisor is gone."""
    changed, scanned = None, 0.0
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        stamp, now = _SHARED.stat().st_mtime_ns, time.monotonic()
        if stamp != changed or now - scanned > _SCAN_S:
            changed, scanned = stamp, now
            custodian.scan()
            custodian.remove_unused(_UNUSED_S)


def _finish(custodian: Custodian) -> None:
    """Kill the processes that do not end within `GRACE_S`, and remove the files that they leave."""
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
    """Run the command of the module's first line."""
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
