"""Looks at the training data before anything starts, and refuses what cannot be trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_hpt.config import Config
from megatron_hpt.data.problem_set import RawRow
from megatron_hpt.data.prompts import LengthLimits, Prompt, PromptReader, Tokenizer
from megatron_hpt.data.scan import Overview, scan
from megatron_hpt.data.source import open_sets
from megatron_hpt.errors import ConfigError, DataError, ModelError
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.fidelity import first_difference, loss
from megatron_hpt.objective.gate import Gate

logger = logging.getLogger(__name__)
EXAMPLES = 64
"""Prompts that are kept as examples, for `megatron-hpt check`."""
LOOKED_AT = 1024
"""Rows that are tokenised before anything starts; other rows are tokenised when a batch takes them."""
ROUND_TRIPS = 64
"""Rows of these whose tokens are turned into text again, to see whether they are the same."""


@dataclass
class TrainingDataReport:
    """Findings about a run's training data before it starts."""

    name: str
    """Files, as `data.train` names them."""
    rows: int = 0
    """Rows that were tokenised: `LOOKED_AT` rows, evenly spread, or all."""
    prompts: int = 0
    """Prompts among these rows that were not dropped."""
    demonstrations: int = 0
    """Prompts among these with a demonstration that can be used."""
    counts: Counter[str] = field(default_factory=Counter)
    """Kind of what was dropped or cut → number of rows."""
    overview: Overview = field(default_factory=Overview)
    """Findings about all rows, none of them tokenised."""
    longest_prompt: int = 0
    """Most tokens of a prompt that was tokenised and not dropped."""
    longest_demonstration: int = 0
    """Most tokens of a demonstration of such a prompt, end-of-sequence included."""
    examples: list[Prompt] = field(default_factory=list)
    """The first `EXAMPLES` of these prompts."""
    unrewarded: int = 0
    """Demonstrations among the examples that were graded and did not earn 1."""

    def add(self, prompt: Prompt | None) -> None:
        """Count a row that was tokenised; None is one that was dropped."""
        self.rows += 1
        if prompt is None:
            return
        self.prompts += 1
        self.demonstrations += prompt.demonstration is not None
        self.longest_prompt = max(self.longest_prompt, len(prompt.tokens))
        self.longest_demonstration = max(self.longest_demonstration, len(prompt.demonstration or ()))
        if len(self.examples) < EXAMPLES:
            self.examples.append(prompt)


def look_at(config: Config, tokenizer: Tokenizer, console: Console) -> TrainingDataReport:
    """Read every row of `data.train` and tokenise some, with a progress bar.

    Raises:
        DataError: raised as by `scan` and `PromptReader.read`, with file and row.
        ModelError: the tokenizer is not what its file says.
    """
    sets = open_sets(config)
    reader = PromptReader(tokenizer, LengthLimits.of(config.data))
    found = TrainingDataReport(", ".join(problems.name for problems in sets))

    first: list[RawRow] = []

    def look(row: RawRow) -> None:
        if len(first) < ROUND_TRIPS:
            first.append(row)
        found.add(reader.read(row, 0.0, found.counts))

    columns = (TextColumn("reading the data"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        rows = progress.add_task("", total=sum(problems.rows for problems in sets))
        found.overview = scan(sets, look, LOOKED_AT, lambda number: progress.advance(rows, number))
    _check_tokens(config, tokenizer, reader, first)
    return found


def _check_tokens(config: Config, tokenizer: Tokenizer, reader: PromptReader, rows: Iterable[RawRow]) -> None:
    """Check that texts of some rows come back from their tokens, and that the tokens are those that tokenizer.json gives.

    Raises:
        DataError: the tokens lose a part of a text; names file and row.
        ModelError: the tokenizer is not what its file says.
    """
    folder, written = hf_side(config.model.path), []
    for row in rows:
        prompt, texts = reader.texts(row)
        written += texts
        for text in (prompt, *texts):
            if lost := loss(tokenizer, text):
                raise DataError(
                    f"{row.where}: {lost}: the tokenizer in {folder} has no tokens for it, so the model can neither read nor "
                    "write it; change the text, or the tokenizer"
                )
    if found := first_difference(tokenizer, folder, written):
        raise ModelError(f"model.path: {found}")


def check_training_data(config: Config, tokenizer: Tokenizer, gate: Gate, held_out: Set[str]) -> TrainingDataReport:
    """Check that every row can be read and used, and that there is what the algorithm learns from; return the findings.

    Args:
        held_out: data sources of the evaluation sets, which may have rewards of their own.

    Raises:
        DataError: a row or the whole cannot be used; names file and row.
        ConfigError: the gate or the reward names a data source that is not there.
    """
    found = look_at(config, tokenizer, Console(stderr=True))
    trained = found.overview.data_sources
    _check_named("algorithm.gate.by_source", config.algorithm.gate.by_source, trained, found.name)
    _check_named("reward.by_source", config.reward.by_source, trained | held_out, f"{found.name} or the evaluation sets")
    if not found.prompts:
        raise DataError(
            f"{found.name}: all of the {found.rows} prompts looked at are longer than "
            f"data.max_prompt_length={config.data.max_prompt_length} tokens"
        )
    none_fits = found.counts["dropped_demonstrations"] and not found.demonstrations
    if gate.needs_demonstrations and (none_fits or not found.overview.demonstrations):
        raise DataError(_without_demonstrations(config, found))
    if placeholders := found.overview.placeholders:
        logger.warning(
            "note: %d rows of %s have a ground truth that says that there is none (%s): no rollout can earn their reward; "
            "tools/prepare_data.py leaves such rows out",
            placeholders.total(),
            found.name,
            ", ".join(f"{truth!r}: {number}" for truth, number in placeholders.most_common(5)),
        )
    for name, number in found.counts.items():
        if number:
            logger.warning("note: %s of the %d prompts looked at: %d", name.replace("_", " "), found.rows, number)
    return found


def _check_named(key: str, named: Iterable[str], there: Set[str], where: str) -> None:
    for name in named:
        if name not in there:
            has = ", ".join(sorted(map(repr, there)))
            raise ConfigError(f"{key}.{name}: no row of {where} is of that data_source; it has {has}")


def _without_demonstrations(config: Config, found: TrainingDataReport) -> str:
    if not found.overview.demonstrations:
        return (
            f"{found.name}: no row has a target, but algorithm.name={config.algorithm.name} learns from demonstrations; "
            "add targets, or choose an algorithm that learns from rollouts alone (grpo, dr_grpo)"
        )
    return (
        f"{found.name}: none of the {found.rows} prompts looked at has a demonstration of at most "
        f"data.max_response_length={config.data.max_response_length} tokens, but algorithm.name={config.algorithm.name} "
        "learns from demonstrations; allow more, or choose data.long_demonstrations=cut"
    )
