"""Sampling test problems. The command and the evaluations inside training use the same code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hpt.engines.types import Sample, Sampler, SamplingRequest, seed_of
from megatron_hpt.evaluation.problems import EvaluationProblem
from megatron_hpt.evaluation.samples import Key, Protocol, SampleRow


@dataclass(frozen=True)
class Wanted:
    """A sample that is to be drawn. Its seed depends only on the protocol's seed, the set, the problem and its number."""

    benchmark: str
    problem: EvaluationProblem
    sample: int
    seed: int


def wanted(
    benchmark: str, problems: Sequence[EvaluationProblem], samples: int, seed: int, have: Container[Key] = ()
) -> list[Wanted]:
    """List the missing samples of a set, problem by problem, so that engines find the prompts in their caches.

    Args:
        have: the samples that are there.
    """
    return [
        Wanted(benchmark, problem, sample, seed_of(seed, "evaluation", benchmark, problem.problem_id, sample))
        for problem in problems
        for sample in range(samples)
        if (problem.problem_id, sample) not in have
    ]


async def draw(
    engine: Sampler,
    missing: Iterable[Wanted],
    protocol: Protocol,
    tokenizer: Any,
    at_once: int,
    found: Callable[[Wanted, SampleRow], None],
) -> None:
    """Draw samples, each as a request of its own, and hand them on as they come.

    Args:
        at_once: how many requests are under way; as many as the engines decode at the same time, so that none is queued.
        found: is called with every sample, ungraded.

    Raises:
        EngineError, DeadlineError: as `engine` raises.
    """
    queue = iter(missing)

    async def worker() -> None:
        for one in queue:
            (sample,) = await engine.generate(_request(one, protocol, tokenizer.eos_token_id))
            found(one, as_row(one, sample, tokenizer))

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(worker())
    except ExceptionGroup as failed:  # all requests of a dead engine fail alike; one of them says enough
        raise failed.exceptions[0] from None


def _request(one: Wanted, protocol: Protocol, stop_token: int) -> SamplingRequest:
    return SamplingRequest(
        tokens=one.problem.tokens,
        samples=1,
        seed=one.seed,
        temperature=protocol.temperature,
        top_p=protocol.top_p,
        max_tokens=protocol.max_tokens,
        stop_token=stop_token,
    )


def as_row(one: Wanted, sample: Sample, tokenizer: Any) -> SampleRow:
    """Make the row of an ungraded sample."""
    problem = one.problem
    response = tokenizer.decode(sample.tokens, skip_special_tokens=True)
    return SampleRow(
        problem_id=problem.problem_id,
        sample=one.sample,
        seed=one.seed,
        data_source=problem.data_source,
        level=problem.level,
        prompt=problem.prompt,
        response=response,
        ground_truth=problem.ground_truth,
        answer=None,
        tokens=len(sample.tokens),
        truncated=sample.finish_reason == "length",
    )
