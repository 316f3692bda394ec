"""What every command of this project does around its work: streams that may fail, files in UTF-8, and an end in words.

Imports little: it runs before anything else.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

import yaml

from megatron_hpt.errors import HptError, Interrupted, RequeueRequested

logger = logging.getLogger(__name__)

BROKEN_PIPE = 141
"""Exit code of what a shell sees end by SIGPIPE."""
REPORT = "this is a fault of megatron_hpt, not of what it was given: report this to the maintainers with the text above"
_TODO = {
    errno.ENOENT: "check the path",
    errno.EACCES: "ask its owner for access, or choose another place",
    errno.EPERM: "ask its owner for access, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "a part of the path is a file; give a folder",
    errno.EEXIST: "choose another name, or move away what is there",
    errno.ENOTEMPTY: "choose another name, or move away what is there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link leads back to itself; mend it, or give another path",
    errno.ENOSPC: "make room on the file system, or choose another one",
    errno.EDQUOT: "make room within the quota, or choose another place",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ECONNREFUSED: "check that the server runs, and its address",
}
"""What helps against an error of the system."""


def run(program: Callable[[], object], error_code: int = 1) -> None:
    """Run a command, and end the process as its end asks: in words, with an exit code.

    An error of ours is its message; one of the system, or of a file's contents, a sentence with the path and what to do; all
    others are faults of this project, with their traceback. Exit codes: 130 interrupted, 75 to be continued.

    Args:
        error_code: of an error of ours that has no code of its own.
    """
    prepare()
    try:
        _ran(program)
    except (Interrupted, RequeueRequested) as error:
        _end(str(error), 130 if isinstance(error, Interrupted) else error.EXIT_CODE, "33", "")
    except HptError as error:
        _end(str(error), error_code if error.EXIT_CODE == 1 else error.EXIT_CODE)
    except (OSError, UnicodeError, RecursionError, json.JSONDecodeError, yaml.YAMLError) as error:
        _end(in_words(error), error_code)
    except Exception as error:
        traceback.print_exception(error)
        _end(REPORT, 1)


def _ran(program: Callable[[], object]) -> None:
    """Run it; what it printed is out, or lost, before it counts as ended."""
    try:
        program()
    except SystemExit:  # how typer's programs end
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _end(message: str, code: int, colour: str = "31", before: str = "error: ") -> None:
    """Print to the error stream, coloured on a terminal, and exit."""
    paint = (lambda text: f"\033[{colour}m{text}\033[0m") if sys.stderr.isatty() else str
    sys.stderr.write(f"{paint(before)}{message}\n" if before else f"{paint(message)}\n")
    sys.exit(code)


def in_words(error: Exception) -> str:
    """A sentence about an error of the system or of a file's contents: which file, what is wrong, what to do."""
    if isinstance(error, OSError) and error.errno is not None:
        what = os.strerror(error.errno) if error.filename or not error.args[1:] else str(error.args[1])
        path = error.filename if error.filename is not None else _file_at_hand(error.__traceback__)
        todo = _TODO.get(error.errno)
        return ": ".join(str(part) for part in (path, what) if part) + (f"; {todo}" if todo else "")
    said = " ".join(str(error).split())
    path = _file_at_hand(error.__traceback__)
    kind = {
        UnicodeError: "not UTF-8 text: write it again as UTF-8",
        RecursionError: "nested too deep to be read",
        json.JSONDecodeError: "not JSON: check that it is whole",
        yaml.YAMLError: "not YAML",
    }
    what = next((text for kinds, text in kind.items() if isinstance(error, kinds)), type(error).__name__)
    return f"{f'{path}: ' if path else ''}{what} ({said})"


def _file_at_hand(trace: TracebackType | None) -> Path | None:
    """The path that the innermost function with one was at work on, for errors that do not know their file."""
    found = None
    while trace is not None:
        paths = [value for value in trace.tb_frame.f_locals.values() if isinstance(value, Path)]
        found = paths[-1] if paths else found
        trace = trace.tb_next
    return found


# Streams.


class OutputLost(SystemExit):
    """Nobody reads the output any more, or it cannot be written; ends a command as it ends other tools."""


class _Guarded(io.RawIOBase):
    """A stream's file. The first failed write is told, and from then on the null device is written to."""

    def __init__(self, raw: io.FileIO, lost: Callable[[OSError], None]) -> None:
        self._raw, self._lost = raw, lost
        self.name = raw.name

    def write(self, data: bytes) -> int | None:
        """As the file's; what is lost counts as written."""
        try:
            return self._raw.write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._raw.fileno())
            os.close(null)
            self._lost(error)
            return len(data)

    def fileno(self) -> int:
        """The file's."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """The file's."""
        return self._raw.isatty()

    def writable(self) -> bool:
        """It is."""
        return True


_goes_on = False
"""The work is worth more than its output."""


def goes_on_without_output() -> None:
    """From here on a closed pipe or a full disk behind standard output is a line in the log, and no end."""
    global _goes_on
    _goes_on = True


def _output_lost(error: OSError) -> None:
    if _goes_on:
        logger.warning("standard output cannot be written any more (%s); the run goes on without it", error.strerror)
    elif error.errno == errno.EPIPE:
        raise OutputLost(BROKEN_PIPE)
    else:
        sys.stderr.write(f"error: standard output: {error.strerror}\n")
        raise OutputLost(1)


def prepare() -> None:
    """Streams that are there, show what they can and may fail; child processes read and write files as UTF-8."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # a stream that is closed would be the next file that is opened
        pass
    os.close(opened)
    os.environ["PYTHONUTF8"] = "1"
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, 1, _output_lost)
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, 2, lambda error: None)
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def _guarded(stream: TextIO | None, own: TextIO | None, number: int, lost: Callable[[OSError], None]) -> TextIO:
    """A stream of the process whose writes are guarded; one that somebody has put in its place stays."""
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if stream is not own or not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    guarded = _Guarded(raw, lost)
    return io.TextIOWrapper(
        guarded if raw is buffer else io.BufferedWriter(guarded),  # it has no buffer where Python was asked for none
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
        write_through=raw is buffer,
    )
