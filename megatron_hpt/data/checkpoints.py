"""Checkpoint folders as files: what is in them, whether they are whole, which of them stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

META = "megatron_hpt.json"


def record(folder: Path, meta: dict[str, Any]) -> None:
    """Write what a complete folder holds beside its files, with the size of each."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / META).write_text(json.dumps({**meta, "files": sizes}, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: every file is there with the size it was written with."""
    try:
        files = json.loads((folder / META).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{META} cannot be read ({error!r})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def superseded(steps: Sequence[int], newest: int, every: int) -> list[int]:
    """Steps whose checkpoints go: all but the `newest` last ones and, if `every` is not 0, those that it divides."""
    return [step for step in sorted(steps)[:-newest] if not every or step % every]


def remove(folder: Path) -> None:
    """Remove a checkpoint so that an interrupted removal leaves none that looks whole."""
    (folder / META).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
