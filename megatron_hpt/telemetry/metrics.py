"""metrics.jsonl and TensorBoard: one line a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_hpt.data.files import write_whole
from megatron_hpt.run import RunDir


class MetricsLog:
    """Appends a step's metrics to both; a resumed run's points replace those of the same steps."""

    def __init__(self, run: RunDir, start: int) -> None:
        self._file = run.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=start)

    def write(self, line: dict[str, Any]) -> None:
        """Add one step."""
        self._file.write(_dump(line))
        self._file.flush()
        for key, value in line.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(key, value, line["step"])
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def truncate(path: Path, start: int) -> None:
    """Drop the lines of step `start` and later: a resumed run writes them again."""
    write_whole(path, "".join(_dump(line) for line in read(path) if line["step"] < start))


def _dump(line: dict[str, Any]) -> str:
    """One line of strict JSON: a number that is none becomes null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(clean) + "\n"
