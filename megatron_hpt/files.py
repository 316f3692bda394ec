"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_hpt.errors import DataError


def check_input(path: Path) -> None:
    """Refuse what cannot be read to an end: a folder, or a device, which may have none.

    Raises:
        DataError: it is one, or is not there.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file")
    if not (path.is_file() or path.is_fifo()):
        raise DataError(f"{path}: is no file; give one")


def check_file(path: Path) -> None:
    """Refuse a file that could not be written, before the work that fills it.

    Raises:
        DataError: says why, and what to give.
    """
    if os.path.isdir(path):
        raise DataError(f"{path}: is a folder; give the name of a file to write")
    _check_place(path, path.absolute().parent)


def check_folder(path: Path) -> None:
    """As `check_file`, for a folder that is there or will be made."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise DataError(f"{path}: is a file; give a folder")
    _check_place(path, path.absolute())


def check_new_folder(path: Path) -> None:
    """As `check_file`, for a folder that `whole_folder` makes."""
    check_folder(path)
    if os.path.isdir(path) and any(path.iterdir()):
        raise DataError(f"{path}: is there and not empty; give the name of a new folder")


_OWN_NAME = 20
"""Bytes that a temporary name of ours is longer than that of its file."""


def _check_place(path: Path, folder: Path) -> None:
    """Something can be made in a folder, or in the nearest one above it that is there; no name that is made is too long."""
    try:
        there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        longest = os.statvfs(there).f_namemax - _OWN_NAME
        made = path.absolute().relative_to(there).parts
        if long := next((len(os.fsencode(name)) for name in made if len(os.fsencode(name)) > longest), None):
            raise DataError(f"{path}: a name of {long} bytes; at most {longest}: choose a shorter one")
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {there}: {error.strerror}; choose another place") from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block succeeds, remove it when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        synced(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def synced(path: Path) -> None:
    """Wait until the disk has a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; rename it into place when the block succeeds, remove it when not.

    Raises:
        OSError: `path` exists and is not an empty folder; what is there is left as it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap_in(new: Path, path: Path) -> None:
    """Rename a whole folder into place; one that is there goes when the new one is."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def continued_folder(path: Path, job: dict[str, Any]) -> Iterator[Path]:
    """As `whole_folder`, for long work: what an interrupted writer of the same job has left is there again.

    An error removes the folder, an interruption (a signal, a dead machine) leaves it.

    Args:
        job: what is written and from what, JSON; another job's remains are removed.

    Raises:
        OSError: `path` exists and is not an empty folder.
        BlockingIOError: another process is writing it.
    """
    temporary, job_file = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.job")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(job_file, path) as lock:
        if os.path.lexists(path):
            job_file.unlink()
            raise FileExistsError(errno.EEXIST, f"{path} exists: another process has written it")
        lock.seek(0)
        if lock.read() != json.dumps(job):
            shutil.rmtree(temporary, ignore_errors=True)
            lock.truncate(0)
            lock.write(json.dumps(job))
            lock.flush()
        temporary.mkdir(exist_ok=True)
        try:
            yield temporary
            _sync_tree(temporary)
            temporary.rename(path)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            job_file.unlink(missing_ok=True)
            raise
        job_file.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path, what: Path) -> Iterator[IO[str]]:
    """The open file, which no other process has locked. Who held the lock before may have removed the file meanwhile."""
    while True:
        with file.open("a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(error.errno, f"another process is writing {what}") from None
            if file.exists() and file.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                yield lock
                return


def _sync_tree(folder: Path) -> None:
    """Wait until the disk has every file of a folder, and that they are in it."""
    for place, _, names in os.walk(folder):
        for name in (*names, "."):
            descriptor = os.open(Path(place) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file at once."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write a text file that only this user may read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
