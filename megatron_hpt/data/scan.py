"""Looking at every row once before anything starts, in constant memory and without a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_hpt.data.fields import check_row
from megatron_hpt.data.placeholders import placeholders
from megatron_hpt.data.problem_set import ProblemSet, RawRow
from megatron_hpt.data.storage.columns import data_sources, demonstrations, doubtful, identities, roles, truths
from megatron_hpt.data.storage.locations import Location
from megatron_hpt.errors import DataError


@dataclass
class Overview:
    """What a scan found."""

    rows: int = 0
    demonstrations: int = 0
    """How many rows have a demonstration."""
    placeholders: Counter[str] = field(default_factory=Counter)
    """Words in place of a ground truth (`proof`, `notfound`) → how many rows have them."""
    data_sources: set[str] = field(default_factory=set)


_CANDIDATES = 1000
"""How many ids with equal hashes are compared as texts: two different ids rarely share 64 bits, so a few are enough."""
Look = Callable[[RawRow], object]


def scan(
    sets: Sequence[ProblemSet], look: Look | None = None, most: int = 0, advance: Callable[[int], None] = lambda _: None
) -> Overview:
    """Read all rows of all sources and check them; `launch.training_data` calls this before a run starts.

    Args:
        look: is called with at most `most` rows, evenly spread, or with all if there are not more; and with the first row of
            each sequence of roles, which chat templates may refuse.
        advance: is called with the number of rows that were read since the last call.

    Raises:
        DataError: with file and row: rows that cannot be read or used, how many there are and what is wrong with the first;
            an id that occurs twice.
    """
    overview = Overview(sum(problems.rows for problems in sets))
    hashes = np.empty(overview.rows, dtype=np.int64)
    seen: set[str] = set()
    bad, done, every = _Bad(), 0, max(1, -(-overview.rows // max(1, most)))
    for problems, number, first, batch in _batches(sets):
        for row in doubtful(batch):
            bad.check(batch, int(row), problems.blocks[number].place(first + int(row)))
        overview.demonstrations += demonstrations(batch)
        overview.data_sources |= data_sources(batch)
        overview.placeholders.update(placeholders(truths(batch)))
        names = _names(problems, number, first, batch)
        if look is not None and not bad.number:
            for row in sorted({*range(-done % every, batch.num_rows, every), *_first(roles(batch), seen)}):
                look(problems.raw(number, first + row, batch.slice(row, 1).to_pylist()[0]))
        hashes[done : done + batch.num_rows] = np.fromiter(map(hash, names), np.int64, batch.num_rows)
        done += batch.num_rows
        advance(batch.num_rows)
    bad.report()
    _check_unique(sets, hashes)
    return overview


def _first(roles: Sequence[str | None], seen: set[str]) -> list[int]:
    """Return the rows of a batch whose sequences of roles were not seen before, and note them as seen."""
    new = []
    for row, sequence in enumerate(roles):
        if sequence is not None and sequence not in seen:
            seen.add(sequence)
            new.append(row)
    return new


def _batches(sets: Sequence[ProblemSet], only: Sequence[str] | None = None):
    """Yield every batch of every set: the set, the number of the block, the batch's first row in the block, the batch."""
    for problems in sets:
        for number in range(len(problems.blocks)):
            first = 0
            for batch in problems.batches(number, only=only):
                yield problems, number, first, batch
                first += batch.num_rows


def _names(problems: ProblemSet, number: int, first: int, batch: pa.RecordBatch) -> list[str]:
    return [problems.default_id(number, first + row) if name is None else name for row, name in enumerate(identities(batch))]


class _Bad:
    """Collects the rows that cannot be used."""

    def __init__(self) -> None:
        self.number = 0
        self._first: DataError | None = None

    def check(self, batch: pa.RecordBatch, row: int, where: str) -> None:
        try:
            check_row(batch.slice(row, 1).to_pylist()[0], where)
        except DataError as error:
            self._first = self._first or error
            self.number += 1

    def report(self) -> None:
        if self._first is not None:
            more = f" ({self.number - 1} more rows cannot be used either)" if self.number > 1 else ""
            raise DataError(f"{self._first}{more}")


def _check_unique(sets: Sequence[ProblemSet], hashes: np.ndarray) -> None:
    """Refuse ids that occur twice. Hashes of eight bytes a row find candidates; only their ids are read again and compared."""
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]][:_CANDIDATES].tolist())
    if not twice:
        return
    seen: dict[str, tuple[Location, int]] = {}
    for problems, number, first, batch in _batches(sets, only=("extra_info.index",)):
        block = problems.blocks[number]
        for row, name in enumerate(_names(problems, number, first, batch)):
            if hash(name) not in twice:
                continue
            place = (block.location, block.first + first + row)
            if name in seen:
                raise DataError(_twice(name, place, seen[name]))
            seen[name] = place


def _twice(name: str, second: tuple[Location, int], first: tuple[Location, int]) -> str:
    elsewhere = "" if second[0] == first[0] else f"{first[0].name}, "
    return (
        f"{second[0].name}, row {second[1]}, extra_info.index: {name!r} is also the id of {elsewhere}row {first[1]}; "
        "ids must be unique"
    )
