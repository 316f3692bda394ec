"""The samples of a benchmark that is being sampled, one a line, so that a killed evaluation loses none that it had."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from megatron_hpt.evaluation.samples import Key, SampleRow


class Journal:
    """Keeps finished samples as they come; a context manager. A last line that was cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[Key, SampleRow] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    row = SampleRow(**json.loads(line))
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                self.rows[row.problem_id, row.sample] = row
                whole += len(line)
            file.truncate(whole)
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: SampleRow) -> None:
        """Keep a sample; it is in the kernel's hands when this returns."""
        self._file.write(json.dumps(asdict(row)) + "\n")
        self._file.flush()
        self.rows[row.problem_id, row.sample] = row

    def ordered(self, problems: Iterable[str], samples: int) -> list[SampleRow]:
        """Return all samples of all problems, in the order of `problems`."""
        return [self.rows[problem, sample] for problem in problems for sample in range(samples)]

    def remove(self) -> None:
        """Delete the file, once its samples are kept elsewhere."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
