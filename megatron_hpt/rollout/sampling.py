"""Sampling and grading many prompts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hpt.data.prompts import Prompt
from megatron_hpt.errors import EngineError
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout.assembly import Group
from megatron_hpt.rollout.engine import Sampler, SamplingRequest


@dataclass(frozen=True)
class Settings:
    """How to sample."""

    samples: Callable[[Prompt], int]
    """How many of each prompt; none: no request."""
    temperature: float
    top_p: float
    max_tokens: int
    stop_token: int


def seed_of(*parts: object) -> int:
    """A seed for one request, the same in every run: 31 bits, since engines add the sample's index to it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


async def sample(
    engine: Sampler, prompts: Sequence[Prompt], settings: Settings, seed: Sequence[object], version: int
) -> list[Group]:
    """Sample every prompt.

    Args:
        seed: what the seeds depend on beside the prompt's place (run seed, purpose, step).
        version: the weights that must have been used.

    Raises:
        EngineError, DeadlineError: as `engine` raises, or it sampled with other weights.
    """

    async def one(place: int, prompt: Prompt) -> Group:
        wanted = settings.samples(prompt)
        if not wanted:
            return Group(prompt)
        request = SamplingRequest(
            tokens=prompt.tokens,
            samples=wanted,
            seed=seed_of(*seed, place),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop_token=settings.stop_token,
        )
        samples = await engine.generate(request)
        wrong = {s.version for s in samples} - {version}
        if wrong:
            raise EngineError(f"prompt {prompt.prompt_id} was sampled with weights {sorted(wrong)}; the batch needs {version}")
        return Group(prompt, samples)

    try:
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(one(place, prompt)) for place, prompt in enumerate(prompts)]
    except ExceptionGroup as failed:  # all requests of a dead engine fail alike; one of them says enough
        raise failed.exceptions[0] from None
    return [task.result() for task in pending]


async def grade(groups: Sequence[Group], pool: GraderPool, tokenizer: Any, demonstrations: bool) -> list[Group]:
    """The groups with their rewards.

    Args:
        demonstrations: grade the prompts' demonstrations too; a verifier need not agree with whoever wrote them.
    """

    async def one(group: Group) -> Group:
        own = group.prompt.demonstration if demonstrations else None
        responses = [sample.tokens for sample in group.samples] + ([own] if own else [])
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rewards = await pool.grade([(text, group.prompt.ground_truth) for text in texts])
        number = len(group.samples)
        return Group(group.prompt, group.samples, rewards[:number], rewards[number] if own else None)

    return await asyncio.gather(*(one(group) for group in groups))
