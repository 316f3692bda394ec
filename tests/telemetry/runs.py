"""Run folders as a training writes them: the real ledger, gate and metrics log; only the policy is a formula."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hpt.batch.history import History
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.config import Config
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample
from megatron_hpt.objective.algorithms import of_run
from megatron_hpt.overrides import apply_overrides
from megatron_hpt.rollout.assembly import Group, assemble
from megatron_hpt.run import RunDir, create
from megatron_hpt.telemetry.metrics import MetricsLog

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'> [a.b]\"'"
SOURCES = ("algebra", "geometry", HOSTILE)
PROMPTS = 30


@dataclass(frozen=True)
class Story:
    """How a run goes."""

    name: str
    steps: int
    finished: int | None = None
    """Steps that it comes to; None: all."""
    overrides: tuple[str, ...] = ()
    evaluates: bool = True
    pace: float = 1.0
    not_taken: frozenset[int] = field(default_factory=frozenset)


def write(root: Path, model: Path, tokenizer: Any, story: Story) -> RunDir:
    """A run of 10 prompts a step with 4 answers, of 30 prompts: a prompt is visited every third step."""
    config = apply_overrides(
        Config(name=story.name, model={"path": str(model)}, data={"train": "train.parquet", "max_response_length": 64}),
        [f"trainer.steps={story.steps}", "trainer.prompts_per_step=10", "rollout.samples_per_prompt=4", *story.overrides],
    )
    run = create(config, root)
    ledger, algorithm, log = Ledger(run.batches), of_run(config), MetricsLog(run, 0)
    history, random_ = History(ledger, 0), random.Random(story.name)
    prompts = [_prompt(index, tokenizer) for index in range(PROMPTS)]
    for step in range(story.steps if story.finished is None else story.finished):
        taken = [prompts[(10 * step + place) % PROMPTS] for place in range(10)]
        groups = [_group(prompt, step, story, algorithm.gate, tokenizer, random_) for prompt in taken]
        ledger.write(assemble(step, groups, algorithm, config, _metrics(step, story), history.choices))
        history.add(step)
        log.write({"step": step, **ledger.read_meta(step)[1], **_trained(step, story)})
    log.close()
    return run


def _prompt(index: int, tokenizer: Any) -> Prompt:
    source, name = SOURCES[index % 3], HOSTILE if index == 2 else f"problem-{index}"
    question, solution = (tokenizer.encode(text) for text in (f"{index}+1+2\n", f"{index}+1={index + 1}"))
    return Prompt(name, question, None if index == 3 else [*solution, tokenizer.eos_token_id], str(index + 3), source)


def _group(prompt: Prompt, step: int, story: Story, gate: Any, tokenizer: Any, random_: random.Random) -> Group:
    """Each problem is learnt at its own time, the one with the highest number last."""
    difficulty = int(prompt.ground_truth) / PROMPTS
    chance = min(1.0, max(0.0, story.pace * step / story.steps * 2 - difficulty))
    asked = gate.samples(4, prompt.demonstration is not None, step)
    right = [random_.random() < chance for _ in range(asked)]
    samples = [_sample(prompt, one, step, tokenizer) for one in right]
    rewards = [None if step == 1 and place == 0 else float(one) for place, one in enumerate(right)]
    return Group(prompt, samples, rewards)


def _sample(prompt: Prompt, right: bool, step: int, tokenizer: Any) -> Sample:
    text = f"\\boxed{{{prompt.ground_truth}}}" if right else "1" * (40 if step < 3 else 12)
    tokens = [*tokenizer.encode(text), tokenizer.eos_token_id]
    return Sample(tokens, [-0.1] * len(tokens), "stop" if right else "length", ((step, len(tokens)),))


def _metrics(step: int, story: Story) -> dict[str, Any]:
    evaluation = {"eval/heldout/avg@8": min(1.0, story.pace * step / story.steps), "eval/version": step}
    evaluation |= {"eval/heldout/solved@8": min(1.0, 1.3 * evaluation["eval/heldout/avg@8"]), "time/eval_s": 1.0}
    seconds = {"time/rollout_s": 3.0 + step % 3, "time/reward_s": 0.2}
    return {**(evaluation if story.evaluates and step % 5 == 0 else {}), **seconds, "data/next_prompt": 10 * (step + 1)}


def _trained(step: int, story: Story) -> dict[str, Any]:
    skipped = step in story.not_taken
    return {
        "train/loss": None if skipped else 2.0 / (1 + step),
        "train/entropy": 1.5 / (1 + step / 10),
        "train/grad_norm": float("nan") if skipped else 3.0 / (1 + step),
        "train/skipped": int(skipped),
        "train/skip_reason": "the gradient norm is nan" if skipped else None,
        "train/tokens": 400,
        "mismatch/k3_kl": 1e-9 * (1 + step % 4) if step else None,
        "time/train_s": 2.0,
        "time/transfer_s": 0.3,
        "time/step_s": 6.0 + step % 3,
        "throughput/tokens_per_s": 60.0,
    }


HPT = Story("hpt", steps=40)
STOPPED = Story(
    "grpo", steps=40, finished=23, overrides=("algorithm.name=grpo",), evaluates=False, pace=0.6, not_taken=frozenset({7, 8})
)
UNION = Story("luffy", steps=1, overrides=("algorithm.name=luffy",))
BLUE, VERMILION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
"""Colours of the first runs of a page."""
