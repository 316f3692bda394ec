"""Test sets in a folder. Each set is a file of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_hpt.errors import DataError
from megatron_hpt.preparation.fields import chat, value
from megatron_hpt.preparation.overlap import HeldOut
from megatron_hpt.preparation.reading import SUFFIXES, Files, files_below, local_files


def sets_in(source: Path) -> dict[str, Files]:
    """Return name → file. A file is called by its own name, FOLDER/NAME/test.json by its folder's; each file is a set.

    Raises:
        DataError: no file, or two of one name.
    """
    if not source.is_dir():
        return {set_name(source): local_files(source)}
    sets: dict[str, Files] = {}
    for path in files_below(source):
        if set_name(path) in sets:
            raise DataError(f"{source}: two files of the name {set_name(path)}: {sets[set_name(path)].paths[0]} and {path}")
        sets[set_name(path)] = Files((path,))
    if not sets:
        raise DataError(f"{source}: no file in it ends in {', '.join(SUFFIXES)}")
    return sets


def set_name(path: Path) -> str:
    """Return what a file of problems is called; NAME/test.json is called by its folder."""
    return path.parent.name if path.stem == "test" else path.stem


def held_out(sources: Sequence[Path], words: int, own: Collection[Path] = ()) -> HeldOut:
    """Read the prompts of test sets, which are JSON or in the project's schema.

    Args:
        words: how many words the sequences have that are compared.
        own: the files that are being prepared; they are no test sets, though they may lie beside some.

    Raises:
        DataError: there is no test set; or, with file and row, a prompt cannot be used.
    """
    tests, prepared = HeldOut(words), {path.resolve() for path in own}
    sets = [(name, files) for source in sources for name, files in sets_in(source).items()]
    others = [(name, files) for name, files in sets if files.paths[0].resolve() not in prepared]
    if not others:
        raise DataError(f"{', '.join(map(str, sources))}: no test set but what is prepared here")
    for name, files in others:
        files.require(["prompt"])
        for record, (_, question) in files.values(lambda fields: chat(value(fields, "prompt"), "prompt"), ["prompt"]):
            tests.add(name, record.row, question)
    return tests
