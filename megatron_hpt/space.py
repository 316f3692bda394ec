"""Full file systems, in words: how full, of what size, and what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hpt.errors import HptError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAID = re.compile(r"No space left on device|Disk quota exceeded")
_PROBE_BYTES = 2**20
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class NoSpaceError(HptError):
    """A file system is full, or a quota is used up."""

    EXIT_CODE = 74
    """EX_IOERR of sysexits.h: by it a supervisor knows, for what the part logged may have found no room either."""


def is_no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that there is no space."""
    if error is None:
        return False
    own = isinstance(error, OSError) and error.errno in _FULL
    return own or _SAID.search(str(error)) is not None or is_no_space(error.__cause__ or error.__context__)


def full(folder: Path) -> str | None:
    """What is said of a folder in which no file of a MiB can be written any more; None: it can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return describe(folder) if error.errno in _FULL else None
    return None


def describe(folder: Path) -> str:
    """How full the file system of a folder is, and what to do."""
    usage = shutil.disk_usage(folder)
    sizes = f"{_size(usage.free)} of {_size(usage.total)} are free, and a quota may allow less"
    remedy = "make room (trainer.keep_checkpoints, old runs), then continue with --resume"
    return f"no space left on the file system of {folder}: {sizes}; {remedy}"


@contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """The block's errors for want of space are one of ours.

    Args:
        folder: where it writes.

    Raises:
        NoSpaceError: there was no space.
    """
    try:
        yield
    except HptError:
        raise
    except Exception as error:
        if not is_no_space(error):
            raise
        raise NoSpaceError(describe(_existing(folder))) from error


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(number: float) -> str:
    for unit in _UNITS[:-1]:
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} {_UNITS[-1]}"
