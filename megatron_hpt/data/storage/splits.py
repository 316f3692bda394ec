"""The split that a file belongs to, told by the names of the file and its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_hpt.errors import DataError

_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("valid", "validation", "val", "dev", "eval", "evaluation", "heldout", "holdout"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}


def split_of(path: str) -> str | None:
    """Return the split that a path names, looking at the outermost folder first; None if it names none.

    Args:
        path: from the folder on that was given, with slashes. ``main/train-0.parquet``, ``gsm8k_test.jsonl``,
            ``held_out/0.parquet``.
    """
    words = re.findall(r"held.?out|hold.?out|[a-z]+", path.lower())
    return next((split for word in words if (split := _SPLITS.get(re.sub("[^a-z]", "", word)))), None)


def check_one_split(source: str, paths: Iterable[str]) -> None:
    """Refuse a folder with files of several splits: it would be read as one set, and they would be mixed by oversight.

    Args:
        paths: of its files, from the folder on.

    Raises:
        DataError: they are of several splits.
    """
    first = {split_of(path): path for path in sorted(paths, reverse=True)}
    held_out = first.keys() - {"train", None}
    if len(first) > 1 and (held_out or None not in first):
        named = ", ".join(f"{split or 'without a split'}: {first[split]}" for split in sorted(first, key=str))
        raise DataError(f"{source}: has files of several splits ({named}); name one of its files or folders")
