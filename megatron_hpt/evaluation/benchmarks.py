"""The test sets of arXiv 2509.04419 by name, and where the files of named sets lie."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hpt.errors import ConfigError, DataError, did_you_mean
from megatron_hpt.preparation.sets import set_name

SUFFIXES = (".parquet", ".jsonl", ".json")
"""Endings of files of problems: in the project's schema (docs/data.md), or an array of ``{prompt, answer}`` as published."""


@dataclass(frozen=True)
class Benchmark:
    """A published test set and how the paper scores it (section 4; avg@32 for the small ones)."""

    title: str
    problems: int
    samples: int = 1
    grader: str = "math"
    aliases: tuple[str, ...] = ()


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME 24", 30, samples=32, aliases=("aime2024",)),
    "aime25": Benchmark("AIME 25", 30, samples=32, aliases=("aime2025",)),
    "amc": Benchmark("AMC", 83, samples=32, aliases=("amc12",)),
    "amc23": Benchmark("AMC 23", 40, samples=32, aliases=("amc2023",)),
    "math-500": Benchmark("MATH-500", 500),
    "minerva": Benchmark("Minerva", 272, aliases=("minerva-math",)),
    "olympiad-bench": Benchmark("Olympiad", 674, aliases=("olympiad",)),
    "gpqa": Benchmark("GPQA-Diamond", 198, grader="choice", aliases=("gpqa-diamond",)),
}
"""`amc` is the set that the paper reports, AMC 12 of 2022 and 2023; `amc23` the one that its repository holds."""
_DEFAULT = Benchmark("", 0)
"""The row for a file of the user's own."""


@dataclass(frozen=True)
class Chosen:
    """A set that is to be evaluated."""

    name: str
    file: Path
    samples: int
    grader: str


def choose(wanted: Sequence[str], data: Path, samples: int | None = None, grader: str | None = None) -> list[Chosen]:
    """Look up the sets that ``--benchmarks`` names.

    Args:
        wanted: names of the table or of files in `data`, or paths of files; each may end in ``@k``, its samples a problem.
        samples, grader: replace those of the table.

    Raises:
        ConfigError: an unknown name, or one that occurs twice.
        DataError: the file of a known name is missing.
    """
    chosen: dict[str, Chosen] = {}
    for entry in wanted:
        text, at, k = entry.partition("@")
        if at and not re.fullmatch(r"[1-9]\d*", k):
            raise ConfigError(f"--benchmarks: given {entry!r}; after @ stands how many samples a problem, e.g. aime24@32")
        one = _one(text.strip(), data, int(k) if k else samples, grader)
        if one.name in chosen:
            raise ConfigError(f"--benchmarks: {one.name} occurs twice")
        chosen[one.name] = one
    if not chosen:
        raise ConfigError(f"--benchmarks: names no set; known: {', '.join(BENCHMARKS)}")
    return list(chosen.values())


def _one(text: str, data: Path, samples: int | None, grader: str | None) -> Chosen:
    name, file = (set_name(Path(text)), Path(text)) if Path(text).suffix in SUFFIXES else _named(text, data)
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected problems as parquet (docs/data.md) or as a JSON array")
    known = BENCHMARKS.get(canonical(name) or "", _DEFAULT)
    return Chosen(name, file, samples or known.samples, grader or known.grader)


def canonical(name: str) -> str | None:
    """Return the table's name for a name, an alias or another spelling of either (case, ``_``, ``-``); None if it has none."""
    plain = _plain(name)
    return next((own for own, row in BENCHMARKS.items() if plain in map(_plain, (own, *row.aliases))), None)


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())


def _named(text: str, data: Path) -> tuple[str, Path]:
    """Return a set's name and its file in `data`, under whichever spelling it lies there."""
    name = canonical(text)
    found = (path for pattern in ("*", "*/test.*") for path in data.glob(pattern) if path.suffix in SUFFIXES)
    files = {path: set_name(path) for path in sorted(found, key=lambda path: SUFFIXES.index(path.suffix))}
    for file, own in files.items():
        if own == text or (name is not None and canonical(own) == name):
            return name or text, file
    if name is None:
        known = [*BENCHMARKS, *(alias for row in BENCHMARKS.values() for alias in row.aliases), *files.values()]
        raise ConfigError(
            f"--benchmarks: given {text!r}; known: {', '.join(BENCHMARKS)}, and what lies in {data} (--data)"
            f"{did_you_mean(text, known)}"
        )
    raise DataError(
        f"{data}/{name}.parquet: no such file, nor {name}.json; --data names the folder of the sets "
        f"(tools/prepare_data.py benchmarks writes them)"
    )
