"""Temporary files of a run's processes in one folder, so that nothing of them is left in /tmp, however a process ends.

vLLM leaves the sockets of its processes, multiprocessing a folder for each process that is killed. A supervisor removes its
folder at its end; one that was killed leaves it, and the next run on the machine removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
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
        self._lock = (self.path / _LOCK).open("w", encoding="utf-8")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        keep_compiled(self.path, Path(tempfile.gettempdir()) / _compiled())

    @property
    def environment(self) -> dict[str, str]:
        """What a process gets whose temporary files belong here."""
        return {"TMPDIR": str(self.path)}

    def close(self) -> None:
        """Remove it; twice is once."""
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
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as file:  # another user's, or held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
