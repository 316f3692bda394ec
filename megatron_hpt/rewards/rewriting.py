"""Texts changed by patterns, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable

Replacement = str | Callable[[re.Match[str]], str]
Rules = tuple[tuple[re.Pattern[str], Replacement], ...]


def rules(*pairs: tuple[str, Replacement]) -> Rules:
    """Patterns with what stands for them."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


def rewritten(text: str, by: Rules) -> str:
    """The text after every rule, in order."""
    for pattern, replacement in by:
        text = pattern.sub(replacement, text)
    return text
