"""One folder for the temporary files of a run's processes, so that nothing is left in /tmp however a process ends.

vLLM leaves its sockets behind, and multiprocessing a folder for each process that is killed. A separate process
(`launch.custodian`) removes the folder when the supervisor has ended, however it ended, together with shared memory that was
left behind. If that process is killed too, the next run on the machine removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_hpt.launch import custodian
from megatron_hpt.launch.custodian import LOCK

_PREFIX = "hpt-"
_END_S = custodian.GRACE_S + 10.0
"""Longest time in seconds that a custodian takes to finish."""


class Scratch:
    """The folder of one supervisor, made here together with its custodian."""

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # a short name: paths of sockets end at 107 characters
        self._lock = (self.path / LOCK).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._custodian = subprocess.Popen(
            [sys.executable, "-m", custodian.__name__, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        keep_compiled(self.path, Path(tempfile.gettempdir()) / _compiled())

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process whose temporary files belong here."""
        return {"TMPDIR": str(self.path)}

    def close(self) -> None:
        """Remove the folder and what its processes have left in shared memory; idempotent. Called when they have ended."""
        self._custodian.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._custodian.wait(_END_S)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def keep_compiled(folder: Path, place: Path) -> None:
    """Keep at `place` what torch compiles for processes whose temporary files are in `folder`, for later runs.

    This is a link, because torch puts headers into the temporary folder whatever TORCHINDUCTOR_CACHE_DIR says
    (_inductor/codecache.py).
    """
    place.mkdir(parents=True, exist_ok=True)
    (folder / _compiled()).symlink_to(place)


def _compiled() -> str:
    """Return the name that torch gives its folder (_inductor/runtime/cache_dir_utils.py)."""
    return f"torchinductor_{getpass.getuser()}"


def sweep() -> None:
    """Remove this user's folders whose supervisors and custodians are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as file:  # another user's, or held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            custodian.remove_noted(lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
