"""The live display: a table of the last steps with time left on a terminal, one line a step elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_COLUMNS = ("step", "accuracy", "SFT share", "held-out", "loss", "tokens/s", "s/step", "time left")
_HISTORY = 10
"""Steps that are kept on screen, and averaged for the time left."""


class Progress:
    """Shows steps as they end; a context manager."""

    def __init__(self, steps: int, start: int, console: Console | None = None) -> None:
        self._steps, self._done = steps, start
        self._console = console or Console()
        self._seconds: deque[float] = deque(maxlen=_HISTORY)
        self._rows: deque[tuple[str, ...]] = deque(maxlen=_HISTORY)
        self._status = ""
        self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.update(self._table())
            self._live.stop()

    def status(self, text: str) -> None:
        """What is going on between steps; on a plain stream each new text is printed once, without its clock."""
        changed = text.partition(" (")[0] != self._status.partition(" (")[0]
        self._status = text
        if self._console.is_terminal:
            self._live.update(self._table())
        elif changed:
            self._console.print(text, highlight=False, soft_wrap=True)

    def step(self, line: dict[str, Any]) -> None:
        """One finished step, as its line of metrics."""
        self._done = line["step"] + 1
        self._seconds.append(line["time/step_s"] + line.get("time/eval_s", 0.0))
        cells = self._cells(line)
        self._rows.append(cells)
        self._status = ""
        if self._console.is_terminal:
            self._live.update(self._table())
        else:
            self._console.print(
                "  ".join(f"{n} {c}" for n, c in zip(_COLUMNS, cells, strict=True)), highlight=False, soft_wrap=True
            )

    def _cells(self, line: dict[str, Any]) -> tuple[str, ...]:
        held_out = next((v for k, v in line.items() if k.startswith("eval/") and "/avg@" in k), None)
        left = statistics.median(self._seconds) * (self._steps - self._done)
        return (
            f"{self._done}/{self._steps}",
            _number(line["rollout/accuracy"], ".3f"),
            _number(line["gate/sft_share"], ".2f"),
            _number(held_out, ".3f"),
            "not taken" if line.get("train/skipped") else _number(line["train/loss"], ".4f"),
            _number(line["throughput/tokens_per_s"], ".0f"),
            _number(line["time/step_s"], ".1f"),
            duration(left),
        )

    def _table(self) -> Table:
        table = Table(box=None, caption=self._status or None, caption_justify="left", header_style="bold")
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows:
            table.add_row(*row)
        return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Counter:
    """Shows how many of many samples are there, with the time left; a context manager."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        """
        Args:
            total: to be made now.
        """
        self._console = console or Console()
        self._total, self._done, self._tokens = total, 0, 0
        self._started = time.monotonic()
        self._printed = 0
        self._status = ""
        self._live = Live("", console=self._console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Counter:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def status(self, text: str) -> None:
        """What is going on before and after; on a plain stream each new text is printed once, without its clock."""
        changed = text.partition(" (")[0] != self._status.partition(" (")[0]
        self._status = text
        if self._console.is_terminal:
            self._live.update(text)
        elif changed:
            self._console.print(text, highlight=False, soft_wrap=True)

    def begin(self) -> None:
        """The first sample is being made: time counts from here."""
        self._started = time.monotonic()

    def sample(self, tokens: int) -> None:
        """One more is there. A plain stream gets a line every tenth of all."""
        self._done += 1
        self._tokens += tokens
        if self._console.is_terminal:
            self._live.update(self._line())
        elif self._done * 10 // self._total > self._printed:
            self._printed = self._done * 10 // self._total
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        left = seconds / self._done * (self._total - self._done)
        rate = self._tokens / max(seconds, 1e-9)
        return f"samples {self._done:,}/{self._total:,}  tokens/s {rate:,.0f}  time left {duration(left)}"
