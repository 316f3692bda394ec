"""The problems of a test set as a model is asked them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_hpt.data.prompts import COLUMNS, Prompt, Tokenizer
from megatron_hpt.errors import DataError

SYSTEM_PROMPTS = {"simplerl": "Please reason step by step, and put your final answer within \\boxed{}."}
"""By name; ``simplerl`` is what the paper's evaluator used."""
_OPTIONAL = ("data_source", "extra_info")


@dataclass(frozen=True)
class Problem:
    """One problem, rendered and tokenised."""

    problem_id: str
    tokens: list[int]
    prompt: str
    """The text of `tokens`, special tokens included."""
    ground_truth: str
    data_source: str = ""
    level: str | None = None


def load_problems(file: Path, tokenizer: Tokenizer, system_prompt: str | None = None) -> list[Problem]:
    """Load a set.

    Args:
        file: parquet in the project's schema, or a JSON array of ``{prompt, answer[, id, source, level]}``.
        system_prompt: put before problems that have none of their own.

    Raises:
        DataError: with file and row: not such a file, no rows, an empty prompt, no answer, an id that occurs twice.
    """
    rows = _json_rows(file) if file.suffix == ".json" else _parquet_rows(file)
    problems: dict[str, Problem] = {}
    for index, row in enumerate(rows):
        where = f"{file}, row {index}"
        problem = _problem(row, index, where, tokenizer, system_prompt)
        if problem.problem_id in problems:
            raise DataError(f"{where}: the id {problem.problem_id!r} occurs twice; ids must be unique")
        problems[problem.problem_id] = problem
    if not problems:
        raise DataError(f"{file}: has no rows")
    return list(problems.values())


def of_prompts(prompts: Sequence[Prompt], tokenizer: Any) -> list[Problem]:
    """Problems of prompts that are tokenised already: a run's."""
    return [
        Problem(p.prompt_id, p.tokens, tokenizer.decode(p.tokens), p.ground_truth, p.data_source, getattr(p, "level", None))
        for p in prompts
    ]


def sha256_of(file: Path) -> str:
    """Digest of a file of problems."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        names = pq.read_schema(file).names
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise DataError(f"{file}: column {', '.join(missing)} missing; it has {', '.join(names)}")
        table = pq.read_table(file, columns=[*COLUMNS, *(name for name in _OPTIONAL if name in names)])
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file}: not a readable parquet file: {error}") from None
    for index, row in enumerate(table.to_pylist()):
        extra, reward = row.get("extra_info") or {}, row["reward_model"] or {}
        identity = extra.get("index")
        yield {
            "id": index if identity is None else identity,
            "prompt": row["prompt"],
            "answer": reward.get("ground_truth"),
            "source": row.get("data_source"),
            "level": extra.get("level"),
        }


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Published sets have an ``id`` that is unique in the set, or none."""
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable JSON file: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: expected an array of problems, found {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file}, row {index}: expected {{prompt, answer}}, found {row!r}")
        prompt = row.get("prompt")
        yield {
            "id": f"{file.stem}-{index}",
            "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            "answer": row.get("answer"),
            "source": row.get("source", file.stem),
            "level": row.get("level"),
        }


def _problem(row: dict[str, Any], index: int, where: str, tokenizer: Any, system_prompt: str | None) -> Problem:
    messages, answer = row["prompt"], row["answer"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise DataError(f"{where}, prompt: given {messages!r}; expected messages with role and content, none of them empty")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{where}: the answer is {answer!r}; expected a text")
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system_prompt}, *messages]
    tokens = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
    level = row["level"]
    return Problem(
        problem_id=str(row["id"]),
        tokens=tokens,
        prompt=tokenizer.decode(tokens),
        ground_truth=answer,
        data_source=row["source"] or "",
        level=None if level is None else str(level),
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v := value.get(k), str) and v.strip() for k in ("role", "content"))
