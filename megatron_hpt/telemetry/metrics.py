"""The metrics of a run, one line a step, as metrics.jsonl and for TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from megatron_hpt.errors import DataError
from megatron_hpt.files import write_whole
from megatron_hpt.run import RunDir


class MetricsLog:
    """Appends a step's metrics to both files. The first line of a resumed run replaces those of its step and of later ones.

    Args:
        start: the first step that will be written.
    """

    def __init__(self, run: RunDir, start: int) -> None:
        self._run, self._start = run, start
        self._file: IO[str] | None = None

    def write(self, line: dict[str, Any]) -> None:
        """Add the metrics of one step; ``step`` is its number."""
        if self._file is None:
            kept = [line for line in read(self._run.metrics) if line["step"] < self._start]
            write_whole(self._run.metrics, "".join(map(_dump, [*kept, line])))
            self._file = self._run.metrics.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._run.tensorboard), purge_step=self._start)
        else:
            self._file.write(_dump(line))
            self._file.flush()
        for key, value in line.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(key, value, line["step"])
        self._board.flush()

    def close(self) -> None:
        """Close both files, if a line has been written."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def step_line(step: int, measured: dict[str, Any]) -> dict[str, Any]:
    """Return a step's line of metrics, with those that follow from others."""
    throughput = measured["train/tokens"] / measured["time/step_s"]
    return {"step": step, **measured, "weights/version": step + 1, "throughput/tokens_per_s": throughput}


def read(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file, without a last line that is still being written; none if there is no file.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); take out the line that is not one JSON object") from None


def _dump(line: dict[str, Any]) -> str:
    """Format one line of strict JSON, which has null for infinity and for what is no number."""
    clean = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
    return json.dumps(clean) + "\n"
