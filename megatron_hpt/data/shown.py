"""Values of the user's data in messages: short, however long or deep they are, and printable everywhere."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """A value as Python writes it, in ASCII, shortened in the middle."""
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
