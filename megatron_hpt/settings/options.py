"""Numbers of command lines: finite, and of a size that can be meant."""

from __future__ import annotations

from typing import Any

import typer

from megatron_hpt.settings.sections import MOST_PROCESSES, MOST_SAMPLES

MOST_SECONDS = 366 * 86_400
MOST_ROWS = 10**9
MOST_TOKENS = 2**27


def number(low: float, high: float, *names: str, help: str = "") -> Any:
    """An option that is a number from `low` to `high`: nothing infinite, and not-a-number neither."""
    return typer.Option(*names, min=low, max=high, help=help)


def processes(help: str) -> Any:
    """An option that counts processes, ranks or engines."""
    return number(1, MOST_PROCESSES, help=help)


def samples(help: str) -> Any:
    """An option that counts samples of one problem."""
    return number(1, MOST_SAMPLES, help=help)
