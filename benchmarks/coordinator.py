"""What a coordinator and a trainer rank do with the tokens of a batch, beside Python objects for every token, as it was before.

    .venv/bin/python benchmarks/coordinator.py [--prompts 128] [--samples 8] [--tokens 8192]

Parsing is of the answer to one prompt; the coordinator makes a whole batch: it parses every answer, assembles the rows and
writes the ledger. A rank is one of eight: it reads the ledger, plans, and packs its share of the rows. Each measurement is a
process of its own; seconds are those of its processor, memory is its peak.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_hpt.batch import rows as batch_rows
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.sglang.server import SglangEngine
from megatron_hpt.engines.types import Sample
from megatron_hpt.engines.vllm.answers import PACKED, pack
from megatron_hpt.engines.vllm.completions import CompletionsEngine
from megatron_hpt.engines.vllm.server import VllmEngine

PROMPT, VOCAB, RANKS, BUDGET, ROUNDS = 256, 151_936, 8, 16_384, 5
NOWHERE = ("http://127.0.0.1:9", 1.0, 1.0)


def answers(samples: int, tokens: int) -> dict[str, bytes]:
    """Make the answers to one prompt by their form, as the engines write them."""
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCAB, (samples, tokens)).tolist()
    logprobs = (-random.exponential(0.5, (samples, tokens))).astype(np.float32).tolist()
    spans = [{"version": "3", "start": 0, "end": tokens}]
    vllm, sglang, completions = [], [], []
    for index, (own, values) in enumerate(zip(ids, logprobs, strict=True)):
        entries = [{"token_id": token, "logprob": value, "rank": 1} for token, value in zip(own, values, strict=True)]
        content = [{**entry, "top_logprobs": [entry]} for entry in entries]
        of_all = {"index": index, "finish_reason": "stop", "stop_reason": None, "token_ids": own, "weight_versions": spans}
        vllm.append({**of_all, "logprobs": {"content": content}, "routed_experts": None, "sampling_mask": None})
        listed = [[value, token, None] for token, value in zip(own, values, strict=True)]
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": listed, "weight_versions": spans}
        sglang.append({"text": None, "output_ids": own, "meta_info": meta})
        words = [f"token_id:{token}" for token in own]
        flat = {"token_logprobs": values, "tokens": words, "text_offset": [0] * tokens, "top_logprobs": [None] * tokens}
        completions.append({**of_all, "logprobs": flat, "text": ""})

    def dumped(answer: Any) -> bytes:
        return json.dumps(answer, separators=(",", ":")).encode()

    json_of_vllm = dumped({"request_id": "x", "choices": vllm})
    return {
        "vllm": json_of_vllm,
        "packed": pack(json_of_vllm),
        "sglang": dumped(sglang),
        "completions": dumped({"id": "x", "choices": completions}),
    }


@dataclasses.dataclass(frozen=True)
class ListedRow:
    """A row as it was: with lists of Python numbers."""

    prompt_id: str
    group: int
    source: str
    tokens: list[int]
    prompt_length: int
    behaviour_logprobs: list[float] | None
    reward: float | None
    advantage: float | None
    weight: float
    policy_version: int | None
    finish_reason: str | None = None
    off_policy: bool = False
    token_advantages: list[float] | None = None
    routes: bytes | None = None


LISTED = pa.schema([field for field in batch_rows.SCHEMA if field.name != "versions"])


def listed(content: bytes) -> list[tuple[list[int], list[float]]]:
    """Read vLLM's JSON as it was."""
    choices = json.loads(content)["choices"]
    return [(choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]) for choice in choices]


@asynccontextmanager
async def reader(form: str) -> AsyncIterator[Callable[[bytes], Any]]:
    """Yield what reads a form of an answer: a client, or `listed`."""
    if form.startswith("listed"):
        yield listed
        return
    clients: dict[str, Callable[[], HttpEngine]] = {
        "vllm": lambda: VllmEngine(*NOWHERE),
        "packed": lambda: VllmEngine(*NOWHERE),
        "sglang": lambda: SglangEngine(*NOWHERE, VOCAB),
        "completions": lambda: CompletionsEngine(*NOWHERE, "model", "own"),
    }
    client = clients[form]()
    yield partial(client.read, kind=PACKED if form == "packed" else "application/json")
    await client.close()


async def parse(folder: Path, form: str) -> dict[str, float]:
    """Measure the seconds of one answer."""
    content = (folder / form.removeprefix("listed ")).read_bytes()
    async with reader(form) as read:
        return {"seconds": statistics.median(_seconds(lambda: read(content)) for _ in range(ROUNDS)), "bytes": len(content)}


async def coordinate(folder: Path, form: str, prompts: int) -> dict[str, float]:
    """Make a batch of the same answer to every prompt, and measure its parts."""
    from megatron_hpt.config import AlgorithmConfig, Config, DataConfig, ModelConfig, TrainerConfig
    from megatron_hpt.data.prompts import Prompt
    from megatron_hpt.objective.algorithms import of_run
    from megatron_hpt.rollout.assembly import Group, assemble

    path, parsed, idle = folder / form.removeprefix("listed "), [], _peak()
    async with reader(form) as read:
        seconds = {"parse": _seconds(lambda: parsed.extend(read(path.read_bytes()) for _ in range(prompts)))}
    prompt = list(range(PROMPT))
    if form.startswith("listed"):
        made = [
            ListedRow(str(group), group, "rollout", [*prompt, *tokens], PROMPT, logprobs, 1.0, 0.5, 1.0, 3, "stop")
            for group, samples in enumerate(parsed)
            for tokens, logprobs in samples
        ]
        ledger = Ledger(folder / "listed")
        seconds["write"] = _seconds(lambda: write_listed(ledger, made))
    else:
        config = Config(
            name="x",
            model=ModelConfig(path="m"),
            data=DataConfig(train="t", max_response_length=2**20),
            algorithm=AlgorithmConfig(name="grpo"),
            trainer=TrainerConfig(prompts_per_step=prompts),
        )
        groups = [_group(Group, Prompt(str(group), prompt, None, "7", ""), samples) for group, samples in enumerate(parsed)]
        ledger, made = Ledger(folder / "batches"), []
        seconds["assemble"] = _seconds(lambda: made.append(assemble(0, groups, of_run(config), config, {})))
        seconds["write"] = _seconds(lambda: ledger.write(made[0]))
    return {**seconds, "peak": _peak(), "idle": idle}


def _group(make: type, prompt: Any, samples: Sequence[Sample]) -> Any:
    return make(prompt, samples, [float(index % 2) for index in range(len(samples))])


def write_listed(ledger: Ledger, made: Sequence[ListedRow]) -> None:
    """Write a ledger as it was."""
    meta = batch_rows.schema_of(batch_rows.Batch(0, [])).metadata
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in made], schema=LISTED.with_metadata(meta))
    ledger.folder.mkdir()
    with pa.ipc.new_file(str(ledger.path(0)), table.schema) as writer:
        writer.write_table(table)


async def rank(folder: Path, form: str) -> dict[str, float]:
    """Read a batch and pack the share of one rank of eight."""
    import torch

    from megatron_hpt.actor.microbatch import MicroBatchLayout, pack_all
    from megatron_hpt.batch.packing import plan_micro_batches

    ledger = Ledger(folder / ("listed" if form == "listed" else "batches"))

    def read_and_pack() -> None:
        read = read_listed(ledger) if form == "listed" else ledger.read(0).rows
        (own, *_) = plan_micro_batches([len(row.tokens) - 1 for row in read], RANKS, BUDGET)
        # The rows that were lists become arrays here, row by row, as they are packed.
        share = {
            index: batch_rows.Row(**vars(read[index])) if form == "listed" else read[index] for part in own for index in part
        }
        pack_all(share, own, torch.device("cpu"), MicroBatchLayout())

    idle = _peak()
    return {"seconds": _seconds(read_and_pack), "peak": _peak(), "idle": idle}


def read_listed(ledger: Ledger) -> list[ListedRow]:
    """Read a ledger as it was: every row of every rank as lists."""
    with pa.memory_map(str(ledger.path(0))) as source:
        records = pa.ipc.open_file(source).read_all().to_pylist()
    return [ListedRow(**{**record, "source": batch_rows.Source(record["source"])}) for record in records]


def _seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def _peak() -> float:
    """Return the peak memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measured(*arguments: object) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report(folder: Path, prompts: int, samples: int, tokens: int) -> None:
    for form, content in answers(samples, tokens).items():
        (folder / form).write_bytes(content)
    of_answer = samples * tokens
    print("| answers | bytes a token | million tokens/s | one answer holds the event loop |\n|---|---|---|---|")
    titles = {
        "listed vllm": "vLLM's JSON as lists",
        "vllm": "vLLM's JSON",
        "packed": "vLLM's, packed by its server",
        "sglang": "SGLang's JSON",
        "completions": "OpenAI's completions",
    }
    for form, title in titles.items():
        found = measured("parse", folder, form)
        speed, size = of_answer / found["seconds"] / 1e6, found["bytes"] / of_answer
        print(f"| {title} | {size:.0f} | {speed:.1f} | {1000 * found['seconds']:.1f} ms |")
    print("\n| coordinator | parse | assemble | write the ledger | peak memory, of which imports |\n|---|---|---|---|---|")
    for form in ("listed vllm", "vllm", "packed"):
        found = measured("coordinate", folder, form, prompts)
        assembled = f"{found['assemble']:.2f} s" if "assemble" in found else "with writing"
        print(
            f"| {titles[form]} | {found['parse']:.2f} s | {assembled} | {found['write']:.2f} s | {found['peak']:.2f} GB, "
            f"{found['idle']:.2f} GB |"
        )
    print(f"\n| a rank of {RANKS} | reads and packs | peak memory, of which imports |\n|---|---|---|")
    for form, title in (("listed", "rows as lists"), ("arrays", "rows as views")):
        found = measured("rank", folder, form)
        print(f"| {title} | {found['seconds']:.2f} s | {found['peak']:.2f} GB, {found['idle']:.2f} GB |")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--prompts", type=int, default=128)
    options.add_argument("--samples", type=int, default=8)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--folder", type=Path, help="where the answers and ledgers are kept while this runs")
    options.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        kind, folder, form, *rest = chosen.measure
        action = {"parse": parse, "coordinate": coordinate, "rank": rank}[kind]
        print(json.dumps(asyncio.run(action(Path(folder), form, *map(int, rest)))))
    else:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            report(Path(folder), chosen.prompts, chosen.samples, chosen.tokens)


if __name__ == "__main__":
    main()
