"""Answers for the reader of the report: those of a few prompts of a few steps, from the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Source
from megatron_hpt.errors import DataError
from megatron_hpt.models.checkpoints import hf_side
from megatron_hpt.models.tokenizer import read_tokenizer
from megatron_hpt.telemetry.report.record import RunRecord
from megatron_hpt.telemetry.report.visits import Visit, evenly

MOST_STEPS = 40
_PROMPTS = 4
"""Prompts that are shown of a step."""
_ANSWERS = 8
"""Answers that are shown of a prompt."""
_HEAD, _TAIL = 2400, 1600
"""Characters that are kept of the beginning and of the end of a longer text; the end has the result."""
_COLUMNS = ("group", "source", "tokens", "prompt_length", "reward", "advantage", "weight", "policy_version", "finish_reason")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class ShownAnswer:
    """One response."""

    text: str
    tokens: int
    reward: float | None
    advantage: float | None
    weight: float
    """Its factor in the loss, 0 if it did not train."""
    finish: str | None


@dataclass(frozen=True)
class PromptAnswers:
    """One prompt of a step: the gate's decision, its demonstration if the ledger has it, and some answers, best first."""

    prompt_id: str
    source: str
    text: str
    solved: int
    graded: int
    choice: str
    rollout_weight: float
    demonstration_weight: float
    demonstration: str | None
    demonstration_step: int | None
    """The step whose batch has the demonstration; a batch has those that trained in it."""
    answers: Sequence[ShownAnswer]
    recorded: int
    """Number of answers in the ledger, shown or not."""


@dataclass(frozen=True)
class Reading:
    """The steps that are shown, and messages about what kept others from being shown."""

    steps: Sequence[dict[str, Any]]
    """``{step, version, prompts}``."""
    problems: Sequence[str] = ()


def read(record: RunRecord, visits: Sequence[Visit], budget: int) -> Reading:
    """Read as many steps at equal distances as fit.

    Args:
        budget: bytes of JSON that the answers may take.
    """
    by_step = {step: list(group) for step, group in groupby(visits, lambda visit: visit.step)}
    decode, problems = _decoder(record)
    reader = _Reader(Ledger(record.run.batches), decode, _demonstrated(visits))
    entries: list[dict[str, Any]] = []
    for step in _spread(evenly(list(by_step), MOST_STEPS)):
        try:
            prompts, version = reader.step(by_step[step])
        except DataError as error:
            problems.append(str(error))
            continue
        entry = {"step": step, "version": version, "prompts": [asdict(prompt) for prompt in prompts]}
        budget -= len(json.dumps(entry, ensure_ascii=False).encode())
        if budget < 0:
            break
        entries.append(entry)
    return Reading(sorted(entries, key=lambda entry: entry["step"]), problems)


def _spread(steps: Sequence[int]) -> Iterator[int]:
    """Yield the first step, the last, and then again and again the middle of a gap, so that any first few cover the run."""
    yield from dict.fromkeys([*steps[:1], *steps[-1:]])
    gaps = [(0, len(steps) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            yield steps[middle]
            gaps += [(low, middle), (middle, high)]


def _demonstrated(visits: Sequence[Visit]) -> dict[str, tuple[int, int]]:
    """Return prompt id → (step, group) of the last visit whose batch has the prompt's demonstration."""
    return {visit.prompt_id: (visit.step, visit.group) for visit in visits if visit.demonstration_weight}


@dataclass(frozen=True)
class _Reader:
    ledger: Ledger
    decode: Decode
    demonstrated: Mapping[str, tuple[int, int]]

    def step(self, visits: Sequence[Visit]) -> tuple[list[PromptAnswers], int | None]:
        """Read some prompts of a step, and the version of the weights that answered.

        Raises:
            DataError: the batch cannot be read.
        """
        # Evenly from the hardest to the easiest, rather than four that are alike.
        ranked = sorted(visits, key=lambda visit: (visit.solved / visit.graded if visit.graded else -1.0, visit.group))
        chosen = evenly(ranked, _PROMPTS)
        rows = self.ledger.select(visits[0].step, [visit.group for visit in chosen], _COLUMNS)
        version = next((row["policy_version"] for row in rows if row["policy_version"] is not None), None)
        return [self._prompt(visit, [row for row in rows if row["group"] == visit.group]) for visit in chosen], version

    def _prompt(self, visit: Visit, rows: Sequence[dict[str, Any]]) -> PromptAnswers:
        rollouts = [row for row in rows if row["source"] == Source.ROLLOUT]
        ranked = sorted(rollouts, key=lambda row: -1.0 if row["reward"] is None else row["reward"], reverse=True)
        demonstration, demonstration_step = self._demonstration(visit, rows)
        any_row = next(iter(rows), demonstration)
        return PromptAnswers(
            visit.prompt_id,
            visit.source,
            self._text(any_row["tokens"][: any_row["prompt_length"]]) if any_row else "(the ledger has no row of this prompt)",
            visit.solved,
            visit.graded,
            visit.choice,
            visit.rollout_weight,
            visit.demonstration_weight,
            self._text(demonstration["tokens"][demonstration["prompt_length"] :]) if demonstration else None,
            demonstration_step,
            [self._answer(row) for row in evenly(ranked, _ANSWERS)],
            len(rollouts),
        )

    def _demonstration(self, visit: Visit, rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, int | None]:
        """Return the row of the prompt's demonstration in this step's batch or in another that trained it, and its step."""
        for row in rows:
            if row["source"] == Source.DEMONSTRATION:
                return row, visit.step
        if visit.prompt_id not in self.demonstrated:
            return None, None
        step, group = self.demonstrated[visit.prompt_id]
        others = self.ledger.select(step, [group], _COLUMNS)
        return next(((row, step) for row in others if row["source"] == Source.DEMONSTRATION), (None, None))

    def _answer(self, row: dict[str, Any]) -> ShownAnswer:
        response = row["tokens"][row["prompt_length"] :]
        numbers = row["reward"], row["advantage"], row["weight"]
        return ShownAnswer(self._text(response), len(response), *numbers, row["finish_reason"])

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.decode(tokens)
        left_out = len(text) - _HEAD - _TAIL
        return text if left_out <= 0 else f"{text[:_HEAD]}\n[… {left_out:,} characters left out …]\n{text[-_TAIL:]}"


def _decoder(record: RunRecord) -> tuple[Decode, list[str]]:
    """Return how token ids become text, and a message where they cannot.

    The tokenizer is that of the run's model or, where the model is gone, of the run's export or checkpoints.
    """
    run = record.run
    written = [run.export, *(run.checkpoint(step) for step in reversed(run.checkpoint_steps()))]
    folders = [hf_side(folder) for folder in (record.config.model.path, *written)]
    for folder in folders:
        if any((folder / name).is_file() for name in _TOKENIZER):
            return read_tokenizer(folder).decode, []
    missing = f"No tokenizer in {folders[0]}, nor in the run's export or checkpoints: texts are shown as token ids."
    return lambda tokens: " ".join(map(str, tokens)), [missing]
