"""The live displays of training and of evaluation: drawn anew in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

_COLUMNS = ("step", "accuracy", "SFT share", "held-out", "loss", "tokens/s", "s/step", "time left")
_HISTORY = 10
"""Steps that are kept on screen, and averaged for the time left."""


class _Display:
    """What is shown on a terminal while the context is held; a stream that is no terminal gets lines instead.

    Args:
        transient: the terminal is cleared of it at the end.
    """

    def __init__(self, console: Console | None, transient: bool) -> None:
        self._console = console or Console()
        self._status = ""
        self._live = Live("", console=self._console, refresh_per_second=4, transient=transient)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.update(self._drawn())
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def status(self, text: str) -> None:
        """Show what is going on; a plain stream gets each new text once, however its clock in parentheses changes."""
        is_new = text.partition(" (")[0] != self._status.partition(" (")[0]
        self._status = text
        self._show(self._drawn(), text if is_new else None)

    def _drawn(self) -> RenderableType:
        """Return what the terminal shows after a change of the status."""
        return self._status

    def _show(self, drawn: RenderableType, line: str | None) -> None:
        """Show something on the terminal, or print a line on a plain stream; None prints nothing."""
        if self._console.is_terminal:
            self._live.update(drawn)
        elif line is not None:
            self._console.print(line, highlight=False, soft_wrap=True)


class Progress(_Display):
    """Shows the steps of a training run as they end: a table of the last ones with the time left. A context manager."""

    def __init__(self, steps: int, start: int, console: Console | None = None) -> None:
        """
        Args:
            steps: of the whole run.
            start: those that are done.
        """
        super().__init__(console, transient=False)
        self._steps, self._done = steps, start
        self._seconds: deque[float] = deque(maxlen=_HISTORY)
        self._rows: deque[tuple[str, ...]] = deque(maxlen=_HISTORY)

    def step(self, line: dict[str, Any]) -> None:
        """Show a step that has ended, given its line of metrics."""
        self._done = line["step"] + 1
        self._seconds.append(line["time/step_s"] + line.get("time/eval_s", 0.0))
        cells = self._cells(line)
        self._rows.append(cells)
        self._status = ""
        self._show(self._drawn(), "  ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, cells, strict=True)))

    def _cells(self, line: dict[str, Any]) -> tuple[str, ...]:
        held_out = next((value for key, value in line.items() if key.startswith("eval/") and "/avg@" in key), None)
        left = statistics.median(self._seconds) * (self._steps - self._done)
        return (
            f"{self._done}/{self._steps}",
            _number(line["rollout/accuracy"], ".3f"),
            _number(line["gate/sft_share"], ".2f"),
            _number(held_out, ".3f"),
            "not taken" if line.get("train/skipped") and not line.get("train/updates") else _number(line["train/loss"], ".4f"),
            _number(line["throughput/tokens_per_s"], ".0f"),
            _number(line["time/step_s"], ".1f"),
            duration(left),
        )

    def _drawn(self) -> Table:
        table = Table(box=None, caption=self._status or None, caption_justify="left", header_style="bold")
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows:
            table.add_row(*row)
        return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Counter(_Display):
    """Shows how many samples of an evaluation are there, with the time left. A context manager."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        """
        Args:
            total: number of samples that are to be made now.
        """
        super().__init__(console, transient=True)
        self._total, self._done, self._tokens = total, 0, 0
        self._started = time.monotonic()
        self._tenths = 0
        """Tenths of all samples for which a plain stream has got a line."""

    def begin(self) -> None:
        """Measure time from now on; called when the first sample is being made."""
        self._started = time.monotonic()

    def sample(self, tokens: int) -> None:
        """Count one more sample of so many tokens. A plain stream gets a line for every tenth of all samples."""
        self._done += 1
        self._tokens += tokens
        tenths, shown = self._done * 10 // self._total, self._tenths
        self._tenths = tenths
        line = self._line()
        self._show(line, line if tenths > shown else None)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        left = seconds / self._done * (self._total - self._done)
        rate = self._tokens / max(seconds, 1e-9)
        return f"samples {self._done:,}/{self._total:,}  tokens/s {rate:,.0f}  time left {duration(left)}"
