"""The problems of a test set, in the form in which a model is asked them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hpt.data.fields import ground_truth, messages
from megatron_hpt.data.parquet import schema_row
from megatron_hpt.data.problem_set import ProblemSet, RawRow
from megatron_hpt.data.prompts import Prompt, Tokenizer
from megatron_hpt.data.rendering import rendered
from megatron_hpt.data.scan import scan
from megatron_hpt.data.storage.locations import find
from megatron_hpt.errors import ConfigError, DataError, did_you_mean
from megatron_hpt.preparation.formats import benchmark
from megatron_hpt.preparation.reading import Files
from megatron_hpt.preparation.sets import set_name

SYSTEM_PROMPTS = {"simplerl": "Please reason step by step, and put your final answer within \\boxed{}."}
"""Name → system prompt; ``simplerl`` is what the paper's evaluator used."""


def system_prompt(given: str | None) -> str | None:
    """Look up a system prompt by name; any text of several words is a system prompt itself.

    Raises:
        ConfigError: a single word that is no name.
    """
    if given is None or given in SYSTEM_PROMPTS:
        return given and SYSTEM_PROMPTS[given]
    if len(given.split()) < 2:
        known = f"{', '.join(SYSTEM_PROMPTS)}, or a text of more than one word"
        raise ConfigError(f"--system-prompt: given {given!r}; allowed: {known}{did_you_mean(given, SYSTEM_PROMPTS)}")
    return given


@dataclass(frozen=True)
class EvaluationProblem:
    """One problem, rendered and tokenised."""

    problem_id: str
    tokens: list[int]
    prompt: str
    """The text of `tokens`, special tokens included."""
    ground_truth: str
    data_source: str = ""
    level: str | None = None


def load_problems(file: Path, tokenizer: Tokenizer, system_prompt: str | None = None) -> list[EvaluationProblem]:
    """Load a test set; ``megatron-hpt evaluate`` calls this.

    Args:
        file: in the project's schema (docs/data.md), or a JSON array of ``{prompt, answer[, source, id, level]}``.
        system_prompt: put before problems that have none of their own.

    Raises:
        DataError: with file and row: not such a file, no rows, an empty prompt, no answer, an id that occurs twice.
    """
    rows = _json_rows(file) if file.suffix == ".json" else _schema_rows(file)
    return [_problem(row, tokenizer, system_prompt) for row in rows]


def of_prompts(prompts: Sequence[Prompt], tokenizer: Any) -> list[EvaluationProblem]:
    """Make problems of prompts that are tokenised already, as those of a run are."""
    return [
        EvaluationProblem(p.prompt_id, p.tokens, tokenizer.decode(p.tokens), p.ground_truth, p.data_source, p.level)
        for p in prompts
    ]


def sha256_of(paths: str | Sequence[str]) -> str:
    """Compute the digest of the files of a set, one after the other."""
    digest = hashlib.sha256()
    for location in find(paths):
        with location.open() as file:
            digest.update(file.read())
    return digest.hexdigest()


def _schema_rows(file: Path) -> list[RawRow]:
    rows = ProblemSet(str(file))
    scan([rows])
    return [rows.row(index) for index in range(rows.rows)]


def _json_rows(file: Path) -> list[RawRow]:
    """Read the rows of a published set as tools/prepare_data.py benchmarks would write them, with the same ids."""
    name = set_name(file).lower()
    form, rows, seen = benchmark(name), [], {}
    for record, named in Files((file,)).values(form.read):
        identity = named.identity or f"{name}-{len(rows)}"
        if identity in seen:
            raise DataError(f"{record.where}, id: {identity!r} is also the id of row {seen[identity]}; ids must be unique")
        seen[identity] = record.row
        rows.append(RawRow(schema_row(named.problem, named.source or name, "test", identity), record.where, identity))
    return rows


def _problem(row: RawRow, tokenizer: Any, system_prompt: str | None) -> EvaluationProblem:
    chat = messages(row.fields["prompt"], f"{row.where}, prompt")
    if system_prompt is not None and all(message["role"] != "system" for message in chat):
        chat = [{"role": "system", "content": system_prompt}, *chat]
    # As training tokenises them (`data.prompts.Reader`): the template has written what there is to be.
    text = rendered(tokenizer, chat, row.where)
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    truth, source = ground_truth(row.fields, row.where), row.fields.get("data_source") or ""
    return EvaluationProblem(row.prompt_id, tokens, tokenizer.decode(tokens), truth, source, row.level)
