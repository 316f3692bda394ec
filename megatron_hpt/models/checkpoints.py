"""Checkpoint folders as files: what is in them, whether they are whole, and which of them stay."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_hpt.errors import CheckpointError
from megatron_hpt.files import write_whole
from megatron_hpt.models import checkpoint_sums

META = "megatron_hpt.json"
BEST = "best.json"
FORMAT = 3
_SUMS = "checksums"
_DAMAGED = "damaged.txt"
SIDE_FILES = "hf"
"""Folder inside a checkpoint with the model's configuration and tokenizer, as in a Hugging Face folder."""
_VERSIONS = ("megatron_hpt", "megatron-core", "torch")


def versions() -> dict[str, str]:
    """Return the versions of the packages that write a checkpoint."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def hf_side(model: str | Path) -> Path:
    """Return where a model's configuration and tokenizer lie: in its folder or, for a checkpoint, in its `SIDE_FILES`."""
    model = Path(model)
    return model / SIDE_FILES if is_checkpoint(model) else model


def is_checkpoint(model: str | Path) -> bool:
    """Whether a model's folder is a checkpoint in Megatron's format, not a Hugging Face folder."""
    return (Path(model) / META).is_file()


def record(folder: Path, meta: dict[str, Any]) -> None:
    """Write down what a complete folder holds, with the size and the checksums of each file (`checkpoint_sums`).

    Args:
        meta: ``step`` (optimizer steps in it), ``optimizer`` (whether its state is there), and what else a resume needs.
    """
    checksums = checkpoint_sums.collect(folder)
    sizes = {name: (folder / name).stat().st_size for name in checksums}
    whole = {**meta, "format": FORMAT, "versions": versions(), "files": sizes, _SUMS: checksums}
    (folder / META).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """Read what `record` wrote.

    Raises:
        CheckpointError: the folder is not a checkpoint of this project, or has another version's format.
    """
    try:
        meta = dict(json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of this project: {error}") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder}: format {meta.get('format')} of {meta.get('versions')}; this version reads format {FORMAT}. "
            "Export it with the version that wrote it, and start from the export"
        )
    return meta


def checksums(folder: Path) -> dict[str, list[str]] | None:
    """Return the checksums of each file's blocks, or None where an older version wrote the checkpoint without any.

    Raises:
        CheckpointError: as `read_meta`.
    """
    return read_meta(folder).get(_SUMS)


def mark_damaged(folder: Path, reason: str) -> None:
    """Have a checkpoint passed over from now on, and leave its files as they are."""
    write_whole(folder / _DAMAGED, reason)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, as far as can be told at once, or None where nothing is.

    Every file must have the size that it was written with, and files of one block their bytes. Larger ones are checked when
    they are read; whoever finds one changed leaves a mark (`mark_damaged`).
    """
    if (reason := incompleteness(folder)) is not None:
        return reason
    if (folder / _DAMAGED).is_file():
        return (folder / _DAMAGED).read_text(encoding="utf-8")
    sums = json.loads((folder / META).read_text(encoding="utf-8")).get(_SUMS, {})
    return checkpoint_sums.differing(folder, {name: blocks for name, blocks in sums.items() if len(blocks) <= 1})


def incompleteness(folder: Path) -> str | None:
    """Return which file is missing or has another size than it was written with, or None where all are whole."""
    try:
        files = dict(json.loads((folder / META).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META} cannot be read ({error!r})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def superseded(steps: Sequence[int], newest: int, every: int, best: Best | None = None) -> list[int]:
    """Return steps whose checkpoints go: all but the last `newest`, the best and, if `every` is not 0, its multiples."""
    kept = {best.step} if best else set()
    return [step for step in sorted(steps)[:-newest] if step not in kept and (not every or step % every)]


@dataclass(frozen=True)
class Best:
    """The checkpoint that a run's validation set chose."""

    step: int
    """Optimizer steps in it."""
    set: str
    metric: str
    value: float


def write_best(run: Path, best: Best) -> None:
    """Name the best checkpoint of a run directory in its best.json; it is not removed while it is there."""
    checkpoint = f"checkpoints/step_{best.step:06d}"
    write_whole(run / BEST, json.dumps({**asdict(best), "checkpoint": checkpoint}, indent=1) + "\n")


def read_best(run: Path) -> Best | None:
    """Read what `write_best` wrote; None where no checkpoint has been chosen.

    Raises:
        CheckpointError: the file does not name a checkpoint.
    """
    try:
        tree = json.loads((run / BEST).read_text(encoding="utf-8"))
        return Best(**{key: value for key, value in tree.items() if key != "checkpoint"})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run / BEST}: does not name a checkpoint: {error}") from None


def remove(folder: Path) -> None:
    """Remove a checkpoint, its `META` first, so that an interrupted removal leaves none that looks whole."""
    (folder / META).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
