"""Where a data set lies: one file, several, a folder or a pattern; on this machine or behind a URL."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from megatron_hpt.data.storage.splits import check_one_split
from megatron_hpt.errors import DataError

SUFFIXES = (".parquet", ".jsonl")
"""Endings of the files that are taken from a folder. Other files there, and hidden ones, are left alone."""


@dataclass(frozen=True)
class Location:
    """One file."""

    filesystem: pafs.FileSystem = field(compare=False)
    path: str
    """Inside the filesystem."""
    name: str
    """How messages call the file."""
    size: int
    """Bytes."""

    def open(self) -> BinaryIO:
        """Open the file for reading at any place."""
        return self.filesystem.open_input_file(self.path)


def find(paths: str | Sequence[str]) -> list[Location]:
    """Find the files of a data set, in an order that depends on their names alone.

    Args:
        paths: each a file, a folder, or a pattern (``*`` within a name, ``**`` across folders), as a path of this machine
            or a URL of a filesystem of pyarrow (s3://, gs://, hdfs://, file://) or of fsspec.

    Raises:
        DataError: nothing there, a folder with files of several splits, or a filesystem that is not installed.
    """
    return [location for path in ([paths] if isinstance(paths, str) else paths) for location in _matching(path)]


def _matching(given: str) -> list[Location]:
    wildcard = re.search(r"[^/]*\*", given)
    base = given[: wildcard.start()] if wildcard else given
    try:
        filesystem, inner = _filesystem(base or ".")
        info = filesystem.get_file_info(inner)
        found = {given: info}
        if info.type is pafs.FileType.Directory:
            meant = _matcher(given[len(base) :]) if wildcard else _is_data
            root = base if not base or base.endswith("/") else f"{base}/"
            below = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
            named = {inside: each for each in below if meant(inside := _inside(each.path, inner))}
            if not wildcard:
                check_one_split(given, [inside for inside, each in named.items() if each.type is pafs.FileType.File])
            found = {root + inside: each for inside, each in named.items()}
    except OSError as error:
        raise DataError(f"{given}: cannot be looked for: {error}") from None
    files = [
        Location(filesystem, each.path, name, each.size) for name, each in found.items() if each.type is pafs.FileType.File
    ]
    if not files:
        what = "a folder without any" if info.type is pafs.FileType.Directory and not wildcard else "no such file"
        raise DataError(f"{given}: {what}; expected a parquet or JSONL file of prompts, a folder or a pattern of such files")
    return sorted(files, key=lambda file: file.path)


def _filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), path
    try:
        return pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid:
        pass  # not one of pyarrow's own
    import fsspec

    protocol = path.partition("://")[0]
    try:
        filesystem = fsspec.filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise DataError(f"{path}: no filesystem for {protocol}://: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), filesystem._strip_protocol(path)


def _inside(path: str, folder: str) -> str:
    """Return the path from a folder on. Filesystems differ in leading slashes and in how they write the working directory."""
    return path.removeprefix("./") if folder == "." else path.strip("/").removeprefix(folder.strip("/")).lstrip("/")


def _is_data(path: str) -> bool:
    return path.endswith(SUFFIXES) and not is_hidden(path)


def is_hidden(path: str, beginnings: tuple[str, ...] = (".", "_")) -> bool:
    """Whether a name in a path, from the folder that was given on, marks somebody's notes: it begins with . or _."""
    return any(part.startswith(beginnings) for part in path.split("/"))


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Compile a pattern: ``**/`` is any folders, ``*`` any part of a name; names that begin with . never match."""
    meaning = {"**/": r"(?:.*/)?", "*": r"[^/]*"}
    compiled = re.compile("".join(meaning.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", pattern)))
    return lambda path: compiled.fullmatch(path) is not None and not is_hidden(path, (".",))
