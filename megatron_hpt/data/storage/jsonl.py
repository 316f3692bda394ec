"""JSON by Python's own parser, a piece at a time: the objects of lines, the elements of an array.

Nothing is typed by what it looks like (a date stays text), no object is too long but for `LONGEST`, and no content ends the
process: on deep nesting pyarrow's reader aborts and ijson's takes all memory. What Python writes is read, NaN included, which
stricter parsers refuse.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

READ_BYTES = 1 << 20
LONGEST = 256 << 20
"""The most bytes that a line may have; a file with a longer one is not a file of lines."""
_BOM = b"\xef\xbb\xbf"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, and refuse one with a key that stands twice: its first value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise NotJson(f"the key {twice!r} stands twice in one object")
    return found


_parser = json.JSONDecoder(object_pairs_hook=_once)
_BEGINNINGS = {
    b"[": "a JSON array; expected one object a line: jq -c '.[]' FILE > FILE.jsonl makes such a file, and "
    "tools/prepare_data.py reads arrays as they are",
    b"PAR1": "a parquet file; its name must end in .parquet",
    b"\x1f\x8b": "compressed with gzip; gunzip FILE unpacks it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unzstd FILE unpacks it",
    b"\xff\xfe\0\0": "text in UTF-32; iconv -f UTF-32 -t UTF-8 FILE > FILE.jsonl makes UTF-8 of it",
    b"\xff\xfe": "text in UTF-16; iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl makes UTF-8 of it",
    b"\xfe\xff": "text in UTF-16; iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl makes UTF-8 of it",
}
"""The beginnings of files that are something else → what they are, and what to do."""


class NotJson(ValueError):
    """Something else is where an object should be. The message says what, as the end of a sentence."""


def check_beginning(start: bytes) -> None:
    """Check that a file has one object a line.

    Args:
        start: its first bytes.

    Raises:
        NotJson: it is of another kind.
    """
    written = start.removeprefix(_BOM).lstrip()
    for beginning, what in _BEGINNINGS.items():
        if written.startswith(beginning):
            raise NotJson(what)


def is_array(start: bytes) -> bool:
    """Whether a file with these first bytes is one JSON array."""
    return start.removeprefix(_BOM).lstrip().startswith(b"[")


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, blank ones too.

    Raises:
        NotJson: one is longer than `LONGEST`.
    """
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, READ_BYTES)
    while line := buffered.readline(LONGEST):
        if len(line) == LONGEST:
            raise NotJson(f"a line of more than {LONGEST >> 20} MiB; expected one object a line")
        yield line


def is_blank(line: bytes) -> bool:
    """Whether a line has nothing in it; such a line is no row."""
    return line.strip() in (b"", _BOM)


def record(line: bytes) -> dict[str, Any]:
    """Parse the object of a line.

    Raises:
        NotJson: the line holds anything else.
    """
    try:
        text = line.removeprefix(_BOM).decode()
        found = _parser.decode(text)
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise NotJson(_why(text, error)) from None
    except (RecursionError, ValueError) as error:
        raise NotJson(_unreadable(error)) from None
    return as_record(found)


def as_record(found: Any) -> dict[str, Any]:
    """Return a value that must be an object.

    Raises:
        NotJson: it is something else.
    """
    if not isinstance(found, dict):
        what = "null" if found is None else f"a {type(found).__name__}"
        raise NotJson(f"{what}, expected a record of named fields")
    return found


def elements(file: BinaryIO) -> Iterator[Any]:
    """Yield the elements of a file that is one JSON array, while it is read.

    Raises:
        NotJson: the file is no array, or the array breaks off.
    """
    array = _Array(file)
    array.skip(_OPENING)
    while not array.skip(_CLOSING):
        yield array.element()
        if not array.skip(_COMMA) and not array.looking_at(_CLOSING):
            raise NotJson(_CUT if array.is_done() else "not JSON: no comma behind the element before it")
    if not array.is_done():
        raise NotJson("not JSON: something stands behind the array")


_OPENING, _COMMA, _CLOSING = (re.compile(rf"\s*{mark}\s*") for mark in (r"\ufeff?\s*\[", ",", r"\]"))
_WHITE = re.compile(r"\s*")
_CUT = "the file is cut off"
_TAIL = 64
"""Characters. An error so near to the end of what was read may only mean that more has to be read."""


class _Array:
    """The part of a file that was read and is not parsed yet."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at, self._ended = "", 0, False

    def skip(self, mark: re.Pattern[str]) -> bool:
        """Step over a mark if it comes next, and say whether it did."""
        found = self.looking_at(mark)
        if found:
            self._at = found.end()
        return found is not None

    def looking_at(self, mark: re.Pattern[str]) -> re.Match[str] | None:
        """Return the match of a mark if it comes next."""
        self.is_done()
        return mark.match(self._text, self._at)

    def is_done(self) -> bool:
        """Whether only white space is left; reads on until that is known."""
        while _WHITE.match(self._text, self._at).end() == len(self._text):
            if self._ended:
                return True
            self._more()
        return False

    def element(self) -> Any:
        """Parse the value that comes next."""
        while True:
            try:
                value, end = _parser.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                if self._ended or not (is_open or error.pos > len(self._text) - _TAIL):
                    is_cut = is_open or error.pos >= len(self._text.rstrip())
                    raise NotJson(_CUT if is_cut else f"not JSON: {error.msg}") from None
            except (RecursionError, ValueError) as error:
                raise NotJson(_unreadable(error)) from None
            else:
                if end < len(self._text) or self._ended:  # a number could go on
                    self._at = end
                    return value
            if len(self._text) - self._at > LONGEST:
                raise NotJson(f"an element of more than {LONGEST >> 20} MiB")
            self._more()

    def _more(self) -> None:
        """Read as much again as is unfinished, so that a long element is parsed only a few times."""
        data = self._file.read(max(READ_BYTES, len(self._text) - self._at))
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decode(data, self._ended)
        except UnicodeDecodeError as error:
            raise NotJson(f"not UTF-8: {error.reason}") from None
        self._at = 0


def _unreadable(error: Exception) -> str:
    """Say why a value that may be JSON is not read: its depth, a number of thousands of digits, or what `_once` refuses."""
    if isinstance(error, NotJson):
        return str(error)
    what = "objects or lists nested too deeply" if isinstance(error, RecursionError) else str(error)
    return f"not JSON that can be read: {what}"


def depth(value: Any) -> int:
    """Return how many objects and lists of a value are inside each other. Does not recurse, so any depth will do."""
    deepest, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        deepest += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return deepest


def _why(text: str, error: json.JSONDecodeError) -> str:
    if error.msg.startswith("Extra data") and text[error.pos :].startswith("{"):
        return "two objects on one line; each needs a line of its own"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return (
            "not JSON: the object does not end on its line: the file is cut off, or pretty-printed (jq -c . FILE > FILE.jsonl "
            "writes one object a line)"
        )
    return f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1} of the line"
