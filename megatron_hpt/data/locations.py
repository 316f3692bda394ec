"""Where a data set lies: one file, several, a folder or a pattern; on this machine or behind a URL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs

from megatron_hpt.errors import DataError

SUFFIXES = (".parquet", ".jsonl")
"""What is taken from a folder; other files there, and those whose names begin with . or _, are left alone."""


@dataclass(frozen=True)
class Location:
    """One file."""

    filesystem: pafs.FileSystem = field(compare=False)
    path: str
    """Inside the filesystem."""
    name: str
    """As messages call it."""
    size: int
    """Bytes."""

    def open(self) -> BinaryIO:
        """The file, for reading at random places."""
        return self.filesystem.open_input_file(self.path)


def find(paths: str | Sequence[str]) -> list[Location]:
    """The files of a data set, in an order that depends on their names alone.

    Args:
        paths: each a file, a folder, or a pattern (``*`` within a name, ``**`` across folders), as a path of this machine
            or a URL of a filesystem of pyarrow (s3://, gs://, hdfs://, file://) or of fsspec.

    Raises:
        DataError: nothing there, or a filesystem that is not installed.
    """
    return [location for path in ([paths] if isinstance(paths, str) else paths) for location in _matching(path)]


def _matching(given: str) -> list[Location]:
    wildcard = re.search(r"[^/]*\*", given)
    base = given[: wildcard.start()] if wildcard else given
    try:
        filesystem, inner = _filesystem(base or ".")
        info = filesystem.get_file_info(inner)
        if wildcard:
            found = _below(filesystem, inner, recursive=True) if info.type is pafs.FileType.Directory else []
            pattern = _pattern(given[wildcard.start() :])
            found = [each for each in found if pattern.fullmatch(_inside(each, inner))]
        elif info.type is pafs.FileType.Directory:
            found = [each for each in _below(filesystem, inner, recursive=True) if _is_data(_inside(each, inner))]
        else:
            found = [info] if info.type is pafs.FileType.File else []
    except OSError as error:
        raise DataError(f"{given}: cannot be looked for: {error}") from None
    if not found:
        raise DataError(
            f"{given}: no such file; expected a parquet or JSONL file of prompts, a folder or a pattern of such files"
        )
    names = {
        each.path: given if len(found) == 1 and not wildcard else base.rstrip("/") + "/" + _inside(each, inner)
        for each in found
    }
    return [Location(filesystem, each.path, names[each.path], each.size) for each in sorted(found, key=lambda each: each.path)]


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


def _below(filesystem: pafs.FileSystem, folder: str, recursive: bool) -> list[pafs.FileInfo]:
    infos = filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive))
    return [info for info in infos if info.type is pafs.FileType.File]


def _inside(info: pafs.FileInfo, folder: str) -> str:
    """Path of a file from a folder on; filesystems differ in leading slashes."""
    return info.path.strip("/").removeprefix(folder.strip("/")).lstrip("/") if folder != "." else info.path.removeprefix("./")


def _is_data(path: str) -> bool:
    return path.endswith(SUFFIXES) and not any(part.startswith((".", "_")) for part in path.split("/"))


def _pattern(text: str) -> re.Pattern[str]:
    """``**/`` any folders, ``*`` any part of a name; nothing else is special."""
    parts = re.split(r"(\*\*/|\*\*|\*)", text)
    meaning = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
