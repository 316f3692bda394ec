"""Prompts and demonstrations from parquet (the seed's schema, docs/data.md), checked row by row at load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.errors import DataError

COLUMNS = ("prompt", "reward_model")
"""Needed; `target` (demonstration), `data_source` and `extra_info` are optional."""


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
    """Response tokens with end-of-sequence; None if the data has none."""
    ground_truth: str
    data_source: str


@dataclass(frozen=True)
class Limits:
    """Longest prompt and response in tokens."""

    prompt: int
    response: int


def load_prompts(path: str, tokenizer: Tokenizer, limits: Limits) -> list[Prompt]:
    """Load a parquet file.

    Raises:
        DataError: with file, row and field: missing columns, an empty prompt, a prompt or demonstration beyond its
            limit, no ground truth, a duplicate id.
    """
    rows = _read(path)
    prompts = [_prompt(row, f"{path}, row {index}", index, tokenizer, limits) for index, row in enumerate(rows)]
    seen: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        if prompt.prompt_id in seen:
            raise DataError(
                f"{path}, row {index}, extra_info.index: {prompt.prompt_id!r} is also the id of row "
                f"{seen[prompt.prompt_id]}; ids must be unique"
            )
        seen[prompt.prompt_id] = index
    return prompts


def _read(path: str) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; expected a parquet file of prompts")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: column {', '.join(missing)} missing; it has {', '.join(table.column_names)}, needed: {', '.join(COLUMNS)}"
        )
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    return table.to_pylist()


def _prompt(row: dict[str, Any], where: str, index: int, tokenizer: Tokenizer, limits: Limits) -> Prompt:
    messages = _messages(row["prompt"], f"{where}, prompt")
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    if len(tokens) > limits.prompt:
        raise DataError(f"{where}, prompt: {len(tokens)} tokens; data.max_prompt_length allows {limits.prompt}")
    truth = _record(row["reward_model"], f"{where}, reward_model").get("ground_truth")
    if not isinstance(truth, str) or not truth:
        raise DataError(f"{where}, reward_model.ground_truth: given {truth!r}; expected a non-empty string")
    identity = _record(row.get("extra_info"), f"{where}, extra_info").get("index")
    return Prompt(
        prompt_id=str(index if identity is None else identity),
        tokens=list(tokens),
        demonstration=_demonstration(row.get("target"), f"{where}, target", tokenizer, limits),
        ground_truth=truth,
        data_source=row.get("data_source") or "",
    )


def _record(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{where}: given {value!r}; expected a record of named fields")
    return value or {}


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: given {value!r}; expected a non-empty list of messages with role and content")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) and fields[key].strip() for key in ("role", "content")):
            raise DataError(f"{where}: a message is empty, or has no role or no text content: {message!r}")
    return value


def _demonstration(value: Any, where: str, tokenizer: Tokenizer, limits: Limits) -> list[int] | None:
    if not value:
        return None
    messages = _messages(value, where)
    if len(messages) != 1:
        raise DataError(f"{where}: {len(messages)} messages; a demonstration is one message")
    text = messages[0]["content"]
    return demonstration_tokens(
        tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id, limits.response, where
    )


def demonstration_tokens(tokens: Sequence[int], end: int, limit: int, where: str) -> list[int] | None:
    """The response that a demonstration is: its tokens and end-of-sequence; None if it is empty.

    Raises:
        DataError: longer than `limit`. Cut, it would teach the policy not to end (the reference does so).
    """
    if not tokens:
        return None
    if len(tokens) + 1 > limit:
        raise DataError(f"{where}: {len(tokens) + 1} tokens with end-of-sequence; data.max_response_length allows {limit}")
    return [*tokens, end]


class PromptSource:
    """Prompts in a shuffled order that is a pure function of seed and position: nothing has to be saved to resume."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts, self._seed = prompts, seed

    def take(self, first: int, number: int) -> list[Prompt]:
        """The prompts at some positions; every epoch is another permutation, and a batch may span two epochs."""
        return [self._at(position) for position in range(first, first + number)]

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[self._order(epoch)[place]]

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_cached", (None, None))[0] != epoch:
            self._cached = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts)))
        return self._cached[1]
