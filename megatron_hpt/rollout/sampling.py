"""Sampling and grading many prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample, Sampler, SamplingRequest, seed_of
from megatron_hpt.errors import EngineError
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout.assembly import Group


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample."""

    samples: Callable[[Prompt], int]
    """How many of each prompt; none: no request."""
    temperature: float
    top_p: float
    max_tokens: int
    stop_token: int


@dataclass(frozen=True)
class Grader:
    """Grades responses as token ids."""

    pool: GraderPool
    tokenizer: Any

    async def grade(self, prompt: Prompt, responses: Sequence[list[int]]) -> list[float | None]:
        """Their rewards, in order; None: ungraded."""
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        problem = self.tokenizer.decode(prompt.tokens)
        answers = [Answer(text, prompt.ground_truth, problem, prompt.data_source) for text in texts]
        return [grade.score for grade in await self.pool.grade(answers)]


class Decider(Protocol):
    """Knows when further samples of a prompt change nothing."""

    def decides_early(self, prompt: Prompt, wanted: int) -> bool:
        """Whether that may happen before all of them are graded."""

    def decided(self, prompt: Prompt, rewards: Sequence[float | None], wanted: int) -> bool:
        """Whether it has happened after these rewards."""


@dataclass(frozen=True)
class Early:
    """What it takes to cancel samples that change nothing any more."""

    decider: Decider
    grader: Grader


async def sample(
    engine: Sampler,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: Sequence[object],
    version: int,
    early: Early | None = None,
) -> list[Group]:
    """Sample every prompt.

    Args:
        seed: what the seeds depend on beside the prompt's place (run seed, purpose, step).
        version: the weights that must have been used.
        early: prompts that can be decided early are graded sample by sample, and what changes nothing is cancelled;
            the samples are the same.

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
        if early is not None and early.decider.decides_early(prompt, wanted):
            group = await _until_decided(engine, prompt, request, early)
        else:
            group = Group(prompt, await engine.generate(request))
        wrong = {s.version for s in group.samples} - {version}
        if wrong:
            raise EngineError(f"prompt {prompt.prompt_id} was sampled with weights {sorted(wrong)}; the batch needs {version}")
        return group

    try:
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(one(place, prompt)) for place, prompt in enumerate(prompts)]
    except ExceptionGroup as failed:  # all requests of a dead engine fail alike; one of them says enough
        raise failed.exceptions[0] from None
    return [task.result() for task in pending]


async def _until_decided(engine: Sampler, prompt: Prompt, request: SamplingRequest, early: Early) -> Group:
    """A graded group. Each sample is a request; those under way when the decision is fixed are cancelled.

    A sample that is finished by then is graded and kept.
    """
    # An engine adds its index to the seed of each sample of one request.
    single = [replace(request, samples=1, seed=request.seed + index) for index in range(request.samples)]
    generations = [asyncio.create_task(engine.generate(each)) for each in single]

    async def graded(generation: asyncio.Task[list[Sample]]) -> tuple[Sample, float | None]:
        (found,) = await generation
        (reward,) = await early.grader.grade(prompt, [found.tokens])
        return found, reward

    answers = [asyncio.create_task(graded(generation)) for generation in generations]
    rewards: list[float | None] = []
    try:
        for answer in asyncio.as_completed(answers):
            rewards.append((await answer)[1])
            if early.decider.decided(prompt, rewards, request.samples):
                break
    finally:
        for generation in generations:  # not the answers: a grader at work would have to be killed
            generation.cancel()
        ended = await asyncio.gather(*answers, return_exceptions=True)
    whole = [answer for answer in ended if not isinstance(answer, BaseException)]
    return Group(prompt, [s for s, _ in whole], [reward for _, reward in whole], cancelled=len(ended) - len(whole))


async def grade(groups: Sequence[Group], grader: Grader, demonstrations: bool) -> list[Group]:
    """The groups with their rewards; those that have them keep them.

    Args:
        demonstrations: grade the prompts' demonstrations too; a verifier need not agree with whoever wrote them.
    """

    async def one(group: Group) -> Group:
        own = group.prompt.demonstration if demonstrations else None
        waiting = [] if group.rewards else [sample.tokens for sample in group.samples]
        rewards = await grader.grade(group.prompt, waiting + ([own] if own else []))
        number = len(waiting)
        return replace(group, rewards=group.rewards or rewards[:number], demonstration_reward=rewards[number] if own else None)

    return await asyncio.gather(*(one(group) for group in groups))
