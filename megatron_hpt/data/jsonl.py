"""JSON Lines by Python's own parser: a line is an object, or a sentence about why not.

Nothing is typed by what it looks like (a date stays text), no line is too long but for `LONGEST`, and no content ends the
process: pyarrow's reader aborts on `null` and on deep nesting. What Python writes is read, NaN included, which stricter parsers
refuse.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

READ_BYTES = 1 << 20
LONGEST = 256 << 20
"""Bytes of a line; more is a file that is not of lines."""
_BOM = b"\xef\xbb\xbf"
_parse = json.JSONDecoder().decode
_BEGINNINGS = {
    b"[": "a JSON array; expected one object a line: jq -c '.[]' FILE > FILE.jsonl makes such a file, and "
    "tools/prepare_data.py reads arrays as they are",
    b"PAR1": "a parquet file; its name must end in .parquet",
    b"\x1f\x8b": "compressed with gzip; gunzip FILE unpacks it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unzstd FILE unpacks it",
    b"\xff\xfe": "text in UTF-16; iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl makes UTF-8 of it",
    b"\xfe\xff": "text in UTF-16; iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl makes UTF-8 of it",
}
"""How a file begins that is something else → what it is, and what to do."""


class NotJson(ValueError):
    """What is there instead of an object; the message is the end of a sentence."""


def check_beginning(start: bytes) -> None:
    """See that a file is one of lines.

    Args:
        start: its first bytes.

    Raises:
        NotJson: it is of another kind.
    """
    written = start.removeprefix(_BOM).lstrip()
    for beginning, what in _BEGINNINGS.items():
        if written.startswith(beginning):
            raise NotJson(what)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their ends, blank ones too.

    Raises:
        NotJson: one is longer than `LONGEST`.
    """
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, READ_BYTES)
    while line := buffered.readline(LONGEST):
        if len(line) == LONGEST:
            raise NotJson(f"a line of more than {LONGEST >> 20} MiB; expected one object a line")
        yield line


def is_blank(line: bytes) -> bool:
    """Nothing is in the line: it is no row."""
    return line.strip() in (b"", _BOM)


def record(line: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises:
        NotJson: it holds anything else.
    """
    try:
        text = line.removeprefix(_BOM).decode()
        found = _parse(text)
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise NotJson(_why(text, error)) from None
    except RecursionError:
        raise NotJson("not JSON that can be read: objects or lists nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise NotJson(f"not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        what = "null" if found is None else f"a {type(found).__name__}"
        raise NotJson(f"{what}, expected a record of named fields")
    return found


def _why(text: str, error: json.JSONDecodeError) -> str:
    if error.msg.startswith("Extra data") and text[error.pos :].startswith("{"):
        return "two objects on one line; each needs a line of its own"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return (
            "not JSON: the object does not end on its line: the file is cut off, or pretty-printed (jq -c . FILE > FILE.jsonl "
            "writes one object a line)"
        )
    return f"not JSON: {error.msg} at character {error.pos + 1} of the line"
