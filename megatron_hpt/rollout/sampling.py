"""Sampling and grading the prompts of a step; the coordinator calls `sample` and then `grade`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.types import Sample, Sampler, SamplingRequest, seed_of
from megatron_hpt.rewards.grades import Answer
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout.assembly import Group


@dataclass(frozen=True)
class SamplingSettings:
    """How the prompts of a step are sampled."""

    samples: Callable[[Prompt], int]
    """How many samples a prompt gets; for 0 no request is made."""
    temperature: float
    top_p: float
    max_tokens: int
    stop_token: int


@dataclass(frozen=True)
class Grader:
    """Decodes responses and has them graded."""

    pool: GraderPool
    tokenizer: Any

    async def grade(self, prompt: Prompt, responses: Sequence[list[int]]) -> list[float | None]:
        """Return the rewards of responses (token ids) to one prompt, in order; None where a response is ungraded."""
        if not responses:
            return []  # of which transformers would make one empty text
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        problem = self.tokenizer.decode(prompt.tokens)
        answers = [Answer(text, prompt.ground_truth, problem, prompt.data_source) for text in texts]
        return [grade.score for grade in await self.pool.grade(answers)]


class Decider(Protocol):
    """Tells `sample` when the samples of a prompt that are still missing cannot change anything, so that they can be cancelled.

    Both methods are called in the coordinator's event loop, between the answers of engines and graders: they must be quick and
    pure. What they raise ends the run. `assembly.GateDecider` is the only one; it asks the gate.
    """

    def decides_early(self, prompt: Prompt, wanted: int) -> bool:
        """Whether `decided` may become true before all `wanted` samples are graded.

        Called once a prompt, before it is sampled. Where it is false the samples are one request, graded by `grade` later, and
        `decided` is not called; where it is true each sample is a request of its own and graded as soon as it ends.
        """

    def decided(self, prompt: Prompt, rewards: Sequence[float | None], wanted: int) -> bool:
        """Whether the decision is fixed, whatever the missing samples bring, and no sample of the prompt will train.

        Called after every graded sample.

        Args:
            rewards: of the samples that are graded so far, in the order in which they ended; None: ungraded.
            wanted: how many samples were requested.
        """


@dataclass(frozen=True)
class Early:
    """What `sample` needs to cancel samples: who decides, and who grades the samples that have ended."""

    decider: Decider
    grader: Grader


async def sample(
    engine: Sampler,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    seed: Sequence[object],
    early: Early | None = None,
) -> list[Group]:
    """Sample every prompt.

    Args:
        seed: what the seeds depend on beside the prompt's place (run seed, purpose, step).
        early: given, prompts that may be decided early are graded sample by sample, and samples that change nothing are
            cancelled. The others are the same samples as without it.

    Returns:
        A group a prompt, in order; ungraded, but for those that were decided early.

    Raises:
        EngineError, DeadlineError: as `engine` raises.
    """

    async def sampled(place: int, prompt: Prompt) -> Group:
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
            return await _until_decided(engine, prompt, request, early)
        return Group(prompt, await engine.generate(request))

    try:
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(sampled(place, prompt)) for place, prompt in enumerate(prompts)]
    except ExceptionGroup as failed:  # all requests of a dead engine fail alike; one of them says enough
        raise failed.exceptions[0] from None
    return [task.result() for task in pending]


async def _until_decided(engine: Sampler, prompt: Prompt, request: SamplingRequest, early: Early) -> Group:
    """Sample and grade one prompt, each sample as a request of its own, until its decision is fixed.

    Samples that are under way then are cancelled; those that have ended are graded and kept.
    """
    # An engine adds its index to the seed of each sample of one request.
    single = [replace(request, samples=1, seed=request.seed + index) for index in range(request.samples)]
    generations = [asyncio.create_task(engine.generate(each)) for each in single]

    async def graded(generation: asyncio.Task[list[Sample]]) -> tuple[Sample, float | None]:
        (response,) = await generation
        (reward,) = await early.grader.grade(prompt, [response.tokens])
        return response, reward

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
    kept = [answer for answer in ended if not isinstance(answer, BaseException)]
    return Group(prompt, [s for s, _ in kept], [reward for _, reward in kept], cancelled=len(ended) - len(kept))


async def grade(groups: Sequence[Group], grader: Grader, demonstrations: bool) -> list[Group]:
    """Add rewards to the groups that have none yet.

    Args:
        demonstrations: grade the prompts' demonstrations too; a verifier need not agree with whoever wrote them.
    """

    async def graded(group: Group) -> Group:
        demonstration = group.prompt.demonstration if demonstrations else None
        ungraded = [] if group.rewards else [sample.tokens for sample in group.samples]
        rewards = await grader.grade(group.prompt, ungraded + ([demonstration] if demonstration else []))
        of_demonstration = rewards.pop() if demonstration else None
        return replace(group, rewards=group.rewards or rewards, demonstration_reward=of_demonstration)

    return await asyncio.gather(*map(graded, groups))
