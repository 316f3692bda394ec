"""One measured number beside what was expected, and the table of them."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HEADER = ("check", "what", "measured", "expected", "verdict")


@dataclass(frozen=True)
class Measurement:
    """A line of the table."""

    check: str
    what: str
    value: float | None = None
    """None where it was left out."""
    unit: str = ""
    low: float | None = None
    """Least that was expected."""
    high: float | None = None
    """Most that was expected."""
    note: str = ""
    """Why it was left out, or how to read it."""

    @property
    def verdict(self) -> str:
        """Whether the value is what was expected, in a word."""
        if self.value is None:
            return "left out"
        if self.low is None and self.high is None:
            return "–"
        inside = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        return "as expected" if inside else "NOT as expected"

    @property
    def cells(self) -> tuple[str, ...]:
        """The line, in the order of `HEADER`."""
        measured = "–" if self.value is None else f"{_number(self.value)} {self.unit}".strip()
        return self.check, self.what, measured, self._expected, f"{self.verdict}: {self.note}" if self.note else self.verdict

    @property
    def _expected(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{_number(self.low)} to {_number(self.high)} {self.unit}".strip()
        if self.low is not None:
            return f"at least {_number(self.low)} {self.unit}".strip()
        if self.high is not None:
            return f"at most {_number(self.high)} {self.unit}".strip()
        return ""


def write(measurements: Iterable[Measurement], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(m)) + "\n" for m in measurements), encoding="utf-8")


def read(path: Path) -> list[Measurement]:
    """Read what `write` wrote; nothing where there is no file."""
    return [Measurement(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def markdown(measurements: Iterable[Measurement]) -> str:
    """Return the table, readable as text and as Markdown."""
    lines = [HEADER, *(m.cells for m in measurements)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    rows = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    return "\n".join([rows[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rows[1:]])


def milliseconds(work: Callable[[], object], device: torch.device, warm: int = 3, repeats: int = 10) -> float:
    """Return the median time of one call, by the device's own clock."""
    for _ in range(warm):
        work()
    if device.type != "cuda":
        return statistics.median(_host_seconds(work) for _ in range(repeats)) * 1e3
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, computed in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def _host_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
