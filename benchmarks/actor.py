"""Training tokens a second of the actor on one rank, beside transformers with padding, and what a save costs.

    .venv/bin/megatron-hpt train recipes/smollm2_gsm.py trainer.steps=1 data.max_response_length=512 'evaluation.sets={}' \
        trainer.export=false
    .venv/bin/python benchmarks/actor.py runs/smollm2_gsm-…

Both compute loss and gradients of the same rows (those of the run's first batch), take turns in one process with the
same threads, and count the rows' own tokens, not padding. transformers runs as its users run it: rows in their order,
padded to the longest of a micro-batch of as many tokens, `sdpa` attention, dense log-softmax. Then all rows get the same
length. The save is one of the weights and optimizer state, in the background and plain.
"""

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_hpt.actor import checkpoint
from megatron_hpt.actor.state import Actor, build_actor
from megatron_hpt.actor.train_step import accumulate
from megatron_hpt.actor.updates import selected_rows
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.packing import places, plan_micro_batches
from megatron_hpt.batch.rows import Row
from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.run import open_run

ROUNDS = 3
EQUAL_LENGTH = 192


def padded_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows in their order, as many to a micro-batch as fit into the budget with padding."""
    batches: list[list[Row]] = []
    for row in rows:
        trial = [*batches[-1], row] if batches else []
        if trial and max(len(r.tokens) for r in trial) * len(trial) <= budget:
            batches[-1] = trial
        else:
            batches.append([row])
    return batches


def transformers_step(network: torch.nn.Module, rows: Sequence[Row], budget: int) -> None:
    """Loss and gradients with padding."""
    network.zero_grad()
    for batch in padded_batches(rows, budget):
        longest = max(len(row.tokens) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest)
        weights = torch.zeros(len(batch), longest - 1)
        for index, row in enumerate(batch):
            ids[index, : len(row.tokens)], mask[index, : len(row.tokens)] = torch.tensor(row.tokens), 1
            weights[index, row.prompt_length - 1 : len(row.tokens) - 1] = row.weight
        logp = network(ids, attention_mask=mask).logits[:, :-1].log_softmax(dim=-1)
        chosen = logp.gather(2, ids[:, 1:, None]).squeeze(2)
        entropy = -(logp.exp() * logp).sum(dim=-1)
        (-(weights * (chosen + 0.01 * entropy)).sum() / weights.numel()).backward()


def measure(actor: Actor, network: torch.nn.Module, rows: Sequence[Row]) -> tuple[float, float]:
    """Tokens a second of both, the median of rounds in which they take turns."""
    tokens, budget = sum(len(row.tokens) for row in rows), actor.config.actor.micro_batch_tokens
    ours, theirs = [], []
    accumulate(actor, rows)  # fresh memory costs page faults, once
    transformers_step(network, rows, budget)
    for _ in range(ROUNDS):
        ours.append(_seconds(lambda: accumulate(actor, rows)))
        theirs.append(_seconds(lambda: transformers_step(network, rows, budget)))
    return tokens / statistics.median(ours), tokens / statistics.median(theirs)


def waste(rows: Sequence[Row], config: Config) -> float:
    """Share of the packed positions that are padding."""
    lengths = [len(row.tokens) - 1 for row in rows]
    (plan,) = plan_micro_batches(lengths, 1, config.actor.micro_batch_tokens)
    packed = sum(sum(places([lengths[i] for i in batch], 1, 1)) for batch in plan)
    return 1 - sum(lengths) / packed


def equal_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows' prompts and responses repeated or cut to one length."""
    rng = random.Random(0)
    changed = []
    for row in rows:
        tokens = [*row.tokens, *(rng.choice(row.tokens) for _ in range(EQUAL_LENGTH))][:EQUAL_LENGTH]
        prompt = min(row.prompt_length, EQUAL_LENGTH // 2)
        logprobs = None if row.behaviour_logprobs is None else [-1.0] * (EQUAL_LENGTH - prompt)
        changed.append(replace(row, tokens=tokens, prompt_length=prompt, behaviour_logprobs=logprobs))
    return changed


def save_seconds(actor: Actor) -> tuple[float, float]:
    """Seconds that training waits for a save: in the background, and plain (Megatron's own, synchronous)."""
    model = actor.config.model.path
    saver, folder = checkpoint.Saver(actor.platform, model), Path(tempfile.mkdtemp(dir="."))

    def save(step: int, wait: bool) -> None:
        saver.save(folder / f"step_{step:06d}", step, actor.chunks, actor.optimizer)
        if wait:
            saver.finish()

    try:
        save(0, wait=True)  # starts the helper process
        waited, plain = [], []
        for step in range(1, 1 + ROUNDS):
            waited.append(_seconds(lambda i=step: save(i, wait=False)))
            saver.finish()
            plain.append(_seconds(lambda i=step: save(100_000 + i, wait=True)))
        return statistics.median(waited), statistics.median(plain)
    finally:
        shutil.rmtree(folder)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Command line."""
    run = open_run(Path(sys.argv[1]))
    from megatron_hpt.overrides import load_yaml

    config = load_yaml(run.config)
    config = config.model_copy(update={"parallel": ParallelConfig()})
    config.actor.threads = os.cpu_count() or 1
    config.actor.micro_batch_tokens = 4096
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    actor = build_actor(config)
    network = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32, attn_implementation="sdpa").train()
    rows = selected_rows(Ledger(run.batches).read(0).rows)
    lengths = sorted(len(row.tokens) for row in rows)
    print(
        f"{len(rows)} rows of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}; "
        f"micro-batches of {config.actor.micro_batch_tokens} tokens; {config.actor.threads} threads; {config.model.dtype}"
    )
    for name, chosen in (("ragged", rows), (f"all of {EQUAL_LENGTH}", equal_rows(rows))):
        ours, theirs = measure(actor, network, chosen)
        print(
            f"{name:12} actor {ours:.0f} tokens/s, transformers {theirs:.0f}: {ours / theirs:.2f} times; "
            f"padding {waste(chosen, config):.1%}"
        )
    waited, plain = save_seconds(actor)
    print(f"a save       keeps training {waited:.2f} s, a plain one {plain:.2f} s: {waited / plain:.0%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
