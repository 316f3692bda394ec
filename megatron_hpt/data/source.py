"""Where a run's prompts come from. Sources are mixed, shuffled and read by position, so a position is all there is to save."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config, SourceConfig
from megatron_hpt.data.curriculum import Curriculum, Streaks
from megatron_hpt.data.order import Shuffle, SourceMixture, uniform
from megatron_hpt.data.problem_set import ProblemSet
from megatron_hpt.data.prompts import LengthLimits, Prompt, PromptReader, Tokenizer
from megatron_hpt.data.storage.fingerprint import fingerprints
from megatron_hpt.errors import DataError

COUNTS = ("dropped_prompts", "dropped_demonstrations", "cut_demonstrations", "passed_solved", "passed_failed")
"""The names of what is counted while prompts are taken (docs/metrics.md, below ``data/``)."""


@dataclass(frozen=True)
class Taken:
    """Prompts, and the position at which the data goes on."""

    prompts: list[Prompt]
    next_position: int
    counts: Counter[str] = field(default_factory=Counter)


class PromptSource:
    """Gives prompts by position: a pure function of the data, the settings, the seed and the streaks."""

    def __init__(
        self,
        sets: Sequence[ProblemSet],
        weights: Sequence[float],
        reader: PromptReader,
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self._sets, self._reader, self._seed, self._curriculum = sets, reader, seed, curriculum
        self._mixture = SourceMixture(weights, (seed, len(sets)))
        self._shuffles = [Shuffle(problems.layout, (seed, number)) for number, problems in enumerate(sets)]

    def take(self, position: int, number: int, streaks: Streaks = {}) -> Taken:  # noqa: B006 (never changed)
        """Take the next prompts that are not dropped or passed over; the coordinator calls this for every round of a step.

        Args:
            position: where to begin; prompts are taken over the end of an epoch.
            number: how many prompts to take.
            streaks: of the prompts, for the curriculum.

        Raises:
            DataError: a row cannot be read or used, or there is no prompt left to take.
        """
        taken, counts = [], Counter(dict.fromkeys(COUNTS, 0))
        first_gone = position
        while len(taken) < number:
            prompt, is_gone = self._at(position, streaks, counts)
            position += 1
            if prompt is not None:
                taken.append(prompt)
            if not is_gone:
                first_gone = position
            elif position - first_gone >= self._patience:
                raise DataError(self._exhausted(counts))
        return Taken(taken, position, counts)

    @property
    def _patience(self) -> int:
        """So many positions that every row has its turn among them."""
        shares = self._mixture.shares
        if len(shares) == 1:
            return self._shuffles[0].rows
        needed = max(shuffle.rows / share for shuffle, share in zip(self._shuffles, shares, strict=True))
        return math.ceil(needed) + SourceMixture.CYCLE  # a cycle is shuffled: a source's places may all be at its end

    def _at(self, position: int, streaks: Streaks, counts: Counter[str]) -> tuple[Prompt | None, bool]:
        """Return the prompt at a position, if any, and whether its row would give none at any other position either."""
        source, draw = self._mixture.at(position)
        row = self._sets[source].row(self._shuffles[source].at(draw))
        if self._curriculum is not None:
            reason = self._curriculum.passes(streaks.get(row.prompt_id, 0), position)
            if reason is not None:
                counts[f"passed_{reason}"] += 1
                return None, self._curriculum.keeps(reason) == 0
        prompt = self._reader.read(row, uniform(self._seed, "demonstration", position), counts)
        return prompt, prompt is None

    def _exhausted(self, counts: Mapping[str, int]) -> str:
        names = ", ".join(problems.name for problems in self._sets)
        found = ", ".join(f"{name.replace('_', ' ')}: {counts[name]}" for name in COUNTS if counts[name])
        return (
            f"{names}: no prompt is left of a whole epoch ({found}). Longer limits (data.max_prompt_length), or "
            "data.curriculum.keep_solved and keep_failed above 0, leave some"
        )


def files(config: Config) -> list[dict[str, Any]]:
    """List the files of `data.train` with their rows and checksums, as JSON; a run keeps it for `check_same_files`."""
    sets = open_sets(config)
    locations = [location for problems in sets for location in problems.locations]
    rows = Counter[str]()
    for block in (block for problems in sets for block in problems.blocks):
        rows[block.location.name] += block.rows
    checksums = fingerprints(locations)
    return [
        {"file": location.name, "rows": rows[location.name], "checksum": checksum}
        for location, checksum in zip(locations, checksums, strict=True)
    ]


def check_same_files(before: Sequence[dict[str, Any]], config: Config) -> None:
    """See that a run goes on with the data that it began with.

    Args:
        before: what `files` returned when the run began.

    Raises:
        DataError: a file is gone, is new, has another number of rows, or other contents as far as its checksum covers them.
    """
    then, now = ({each["file"]: each for each in listed} for listed in (before, files(config)))
    back = "Put the file back, or start a new run without --resume"
    for name in sorted(then.keys() | now.keys()):
        was, there = then.get(name, {}), now.get(name, {})
        if was.get("rows") != there.get("rows"):
            known = [f"{each['rows']} rows" if each else "not there" for each in (was, there)]
            raise DataError(
                f"{name}: {known[0]} when the run started, {known[1]} now; the order of the data would be another one. {back}"
            )
        if was.get("checksum", there["checksum"]) != there["checksum"]:  # older runs have none
            raise DataError(
                f"{name}: as many rows as when the run started, but other contents (checksum {was['checksum']} then, "
                f"{there['checksum']} now); the rest of the run would train on other data. {back}"
            )


def held_out_limits(config: Config) -> LengthLimits:
    """Return the limits of held-out sets: none of their prompts may be left out, and their demonstrations are not used."""
    return LengthLimits(config.data.max_prompt_length, config.data.max_response_length, long_demonstrations="drop")


def sources(config: Config) -> list[SourceConfig]:
    """List what `data.train` names; files without weights are one source, whose rows all weigh the same."""
    train = config.data.train
    if isinstance(train, str) or isinstance(train[0], str):
        return [SourceConfig(path=train, weight=1.0)]
    return list(train)


def open_sets(config: Config, scratch: Path | None = None) -> list[ProblemSet]:
    """Open the sources of `data.train`.

    Raises:
        DataError: as `ProblemSet`.
    """
    named = sources(config)
    return [
        ProblemSet(source.path, scratch, prefix=f"{number}/" if len(named) > 1 else "") for number, source in enumerate(named)
    ]


def training_source(config: Config, sets: Sequence[ProblemSet], tokenizer: Tokenizer) -> PromptSource:
    """Make the source of the prompts that a run trains on."""
    data, seed = config.data, config.trainer.seed
    chosen = data.curriculum
    curriculum = None
    if chosen.is_on:
        curriculum = Curriculum(chosen.visits, chosen.keep_solved, chosen.keep_failed, seed)
    weights = [source.weight for source in sources(config)]
    return PromptSource(sets, weights, PromptReader(tokenizer, LengthLimits.of(data)), seed, curriculum)
