"""Temporary files of a run's processes in one folder, so that nothing of them is left in /tmp, however a process ends.

vLLM leaves the sockets of its processes, multiprocessing a folder for each process that is killed. A supervisor removes its
folder at its end; one that was killed leaves it, and the next run on the machine removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "hpt-"
_LOCK = "lock"
"""In the folder: whoever holds it lives. Process ids say nothing where containers share /tmp."""


class Scratch:
    """The folder of one supervisor."""

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # a short name: paths of sockets end at 107 characters
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    @property
    def environment(self) -> dict[str, str]:
        """What a process gets whose temporary files belong here; what torch has compiled outlives them."""
        compiled = f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
        return {"TMPDIR": str(self.path), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled)}

    def close(self) -> None:
        """Remove it; twice is once."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def sweep() -> None:
    """Remove this user's folders whose supervisors are gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+") as file:  # another user's, or held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
