"""Temporary files of a run's processes in one folder, so that nothing of them is left in /tmp, however a process ends.

vLLM leaves the sockets of its processes, multiprocessing a folder for each process that is killed. A process of its own
(`launch.custodian`) removes the folder at the supervisor's end, however that comes, and with it shared memory that was left
behind; were it killed too, the next run on the machine does so.
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
"""Longest time that a custodian takes to finish."""


class Scratch:
    """The folder of one supervisor."""

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
        """What a process gets whose temporary files belong here."""
        return {"TMPDIR": str(self.path)}

    def close(self) -> None:
        """Remove it, and what is left in shared memory; twice is once."""
        self._custodian.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._custodian.wait(_END_S)
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def keep_compiled(folder: Path, place: Path) -> None:
    """What torch compiles for processes whose temporary files are in `folder` is to be kept at `place`.

    A link, since torch has headers in the temporary folder whatever TORCHINDUCTOR_CACHE_DIR says (_inductor/codecache.py).
    """
    place.mkdir(parents=True, exist_ok=True)
    (folder / _compiled()).symlink_to(place)


def _compiled() -> str:
    """How torch calls its folder (_inductor/runtime/cache_dir_utils.py)."""
    return f"torchinductor_{getpass.getuser()}"


def sweep() -> None:
    """Remove this user's folders whose supervisors are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as file:  # another user's, or held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            custodian.remove_noted(lock.parent)
            shutil.rmtree(lock.parent, ignore_errors=True)
