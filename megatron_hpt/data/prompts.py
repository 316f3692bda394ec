"""From a row of the data (docs/data.md) to token ids: the prompt, and the demonstration as a response to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_hpt.config import DataConfig
from megatron_hpt.data.fields import demonstrations, ground_truth, messages
from megatron_hpt.data.problem_set import ProblemSet, RawRow
from megatron_hpt.data.rendering import rendered
from megatron_hpt.data.scan import scan
from megatron_hpt.errors import DataError

_OPENED = re.compile(r"(?P<mark><[^<>\s/][^<>\s]*>|\[[A-Z]+\])(?P<space>\s*)\Z")
"""A mark that a generation prompt may end with: ``<think>``, ``[THINK]``, ``<|assistant|>``."""
Long = Literal["drop", "cut", "refuse"]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages."""

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Text to token ids."""


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once."""

    prompt_id: str
    tokens: list[int]
    demonstration: list[int] | None
    """The response tokens with end-of-sequence; None if there is no demonstration that can be used."""
    ground_truth: str
    data_source: str
    level: str | None = None
    """How hard the problem is, in the words of its source."""


@dataclass(frozen=True)
class LengthLimits:
    """The longest prompt and response in tokens, and what becomes of longer ones."""

    prompt: int
    response: int
    long_prompts: Long = "refuse"
    long_demonstrations: Long = "refuse"

    @staticmethod
    def of(data: DataConfig) -> LengthLimits:
        """Return the limits of a run's training data."""
        return LengthLimits(data.max_prompt_length, data.max_response_length, data.long_prompts, data.long_demonstrations)


class PromptReader:
    """Makes prompts of rows. What it drops or cuts is counted, under the names that docs/metrics.md has below ``data/``."""

    def __init__(self, tokenizer: Tokenizer, limits: LengthLimits) -> None:
        self._tokenizer, self._limits = tokenizer, limits

    def read(self, row: RawRow, visit: float, counts: Counter[str]) -> Prompt | None:
        """Make the prompt of a row; None if it is dropped.

        Args:
            visit: in [0, 1): chooses between several demonstrations.

        Raises:
            DataError: names row and field: an empty prompt, no ground truth, what is too long where that is refused.
        """
        fields, where = row.fields, row.where
        chat = messages(fields["prompt"], f"{where}, prompt")
        truth, written = ground_truth(fields, where), demonstrations(fields, where)
        text = rendered(self._tokenizer, chat, where)
        tokens = self._encode(text)
        if len(tokens) > self._limits.prompt:
            if self._limits.long_prompts == "refuse":
                raise DataError(f"{where}, prompt: {len(tokens)} tokens; data.max_prompt_length allows {self._limits.prompt}")
            counts["dropped_prompts"] += 1
            return None
        demonstration = self._demonstration(text, written, where, visit, counts)
        return Prompt(row.prompt_id, tokens, demonstration, truth, fields.get("data_source") or "", row.level)

    def texts(self, row: RawRow) -> tuple[str, list[str]]:
        """Return the rendered prompt of a row; and the texts that its data has: messages and demonstrations.

        Raises:
            DataError: as `read`.
        """
        chat = messages(row.fields["prompt"], f"{row.where}, prompt")
        written = [*(message["content"] for message in chat), *demonstrations(row.fields, row.where)]
        return rendered(self._tokenizer, chat, row.where), written

    def _demonstration(
        self, prompt: str, written: Sequence[str], where: str, visit: float, counts: Counter[str]
    ) -> list[int] | None:
        """Choose a demonstration; if it is too long and long ones are dropped, the next one that is not."""
        limit, long = self._limits.response, self._limits.long_demonstrations
        chosen = int(visit * len(written))
        for text in (*written[chosen:], *written[:chosen]):
            tokens = self._encode(without_open_think(prompt, text))
            response = demonstration_tokens(tokens, self._tokenizer.eos_token_id, limit, long, f"{where}, target")
            if response is not None:
                counts["cut_demonstrations"] += len(tokens) + 1 > limit
                return response
        counts["dropped_demonstrations"] += bool(written)
        return None

    def _encode(self, text: str) -> list[int]:
        """Encode text without adding tokens: the chat template has written all special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def without_open_think(prompt: str, demonstration: str) -> str:
    """Remove the opening ``<think>`` (or what a model calls it) from a demonstration if the prompt ends with it already,
    whatever white space is around it."""
    opened = _OPENED.search(prompt)
    if opened is None or not demonstration.lstrip().startswith(opened["mark"]):
        return demonstration
    return demonstration.lstrip().removeprefix(opened["mark"]).removeprefix(opened["space"])


def demonstration_tokens(tokens: Sequence[int], end: int, limit: int, long: Long, where: str) -> list[int] | None:
    """Make a response of a demonstration: its tokens and end-of-sequence; None if it is empty or dropped.

    Args:
        long: what becomes of a demonstration longer than `limit`. One that is cut teaches the policy not to end; the
            reference cuts.

    Raises:
        DataError: longer than `limit` where that is refused.
    """
    if not tokens:
        return None
    if len(tokens) + 1 > limit and long != "cut":
        if long == "drop":
            return None
        raise DataError(f"{where}: {len(tokens) + 1} tokens with end-of-sequence; data.max_response_length allows {limit}")
    return [*tokens, end][:limit]


def load_prompts(paths: str | Sequence[str], tokenizer: Tokenizer, limits: LengthLimits) -> list[Prompt]:
    """Load all prompts of a set that fits into memory, in the order of its files.

    Raises:
        DataError: with file, row and field: what `ProblemSet` and `PromptReader` refuse, and an id that occurs twice.
    """
    problems, reader = ProblemSet(paths), PromptReader(tokenizer, limits)
    scan([problems])
    found = (problems.row(index) for index in range(problems.rows))
    read = (reader.read(row, 0.0, Counter()) for row in found)
    return [prompt for prompt in read if prompt is not None]
