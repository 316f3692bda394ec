"""Records that hold numpy arrays."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


class ArrayRecord:
    """Base of frozen dataclasses that have arrays as fields; they are made with ``eq=False`` and compared as defined here."""

    def __eq__(self, other: object) -> bool:
        """Compare field by field, arrays by dtype and elements."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_is_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = None

    def hold(self, **dtypes: type[np.generic]) -> None:
        """Turn the fields of these names, given as any sequence or as None, into arrays; called by `__post_init__`.

        An array of the right dtype is held as it is, not copied.
        """
        for name, dtype in dtypes.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype))


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return False
    return one == other
