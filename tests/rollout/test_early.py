"""Prompts whose decision is fixed before all of their samples are there: a real server, real graders, the gate."""

import asyncio

import pytest

from megatron_hpt.config import GateConfig, RewardConfig
from megatron_hpt.data.prompts import Prompt
from megatron_hpt.engines.pool import EnginePool
from megatron_hpt.engines.types import Versions, seed_of
from megatron_hpt.errors import EngineError
from megatron_hpt.objective.gates import hybrid
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rollout.assembly import GateDecider, Group
from megatron_hpt.rollout.sampling import Early, Grader, SamplingSettings, grade, sample
from tests.engines.servers import PATIENCE, Server, serve

N = 4
SETTINGS = SamplingSettings(lambda _: N, 1.0, 1.0, 16, 1)
PROMPT = Prompt("p", [5, 6], [8, 1], "7", "")
SEED = seed_of(0, 0)
"""Of the first prompt's request."""
LONG_S = 60.0


@pytest.fixture(scope="module")
def graders():
    """A pool of grader processes."""
    with GraderPool(RewardConfig(deadline_s=30.0)) as pool:
        yield pool


@pytest.fixture
def answers(tokenizer):
    """Makes a server's samples: right for some indices of a request, wrong for the others."""

    def of(*right: int):
        encoded = [tokenizer.encode(f"\\boxed{{{n}}}", add_special_tokens=False) for n in (8, 7)]
        return lambda seed: encoded[seed - SEED in right]

    return of


def run(server: Server, grader: Grader, gate: GateConfig, prompt: Prompt = PROMPT):
    """Sample one prompt as the coordinator does."""

    async def action(clients):
        pool = EnginePool(clients, PATIENCE, period_s=0.05)
        async with pool.serving(Versions(3, 3)) as engines:
            early = Early(GateDecider(hybrid(gate), 0, {}), grader)
            groups = await sample(engines, [prompt], SETTINGS, (0,), early)
            groups = await grade(groups, grader, demonstrations=False)
        while server.running:  # a closed connection is noticed a moment later
            await asyncio.sleep(0.01)
        return groups[0]

    return serve([server], action)


def slow(*indices: int):
    """These samples of the first prompt take too long."""
    return lambda seed: LONG_S if seed - SEED in indices else 0.0


def test_stragglers_that_change_nothing_are_cancelled_and_leave_the_engine(graders, tokenizer, answers) -> None:
    server = Server(slow_s=slow(1, 3), tokens=answers())
    group = run(server, Grader(graders, tokenizer), GateConfig(threshold=2))
    assert (group.rewards, group.cancelled) == ([0.0, 0.0], 2)
    assert sorted(server.seeds) == [SEED + index for index in range(N)]  # as an engine seeds the samples of one request
    assert sorted(server.dropped) == [SEED + 1, SEED + 3]
    assert server.running == 0


def test_a_prompt_that_may_yet_go_to_rl_waits_for_all_of_its_rollouts(graders, tokenizer, answers) -> None:
    server = Server(slow_s=lambda seed: 0.2 * (seed - SEED), tokens=answers(1, 2, 3))
    group = run(server, Grader(graders, tokenizer), GateConfig(threshold=2))
    assert (group.rewards, group.cancelled) == ([0.0, 1.0, 1.0, 1.0], 0)
    assert server.dropped == []


def test_samples_are_in_order_and_the_same_as_those_of_one_request(graders, tokenizer, answers) -> None:
    grader = Grader(graders, tokenizer)
    single = run(Server(slow_s=lambda seed: 0.1 * (SEED + N - seed), tokens=answers(0, 1, 2)), grader, GateConfig(threshold=1))
    whole = Server(tokens=answers(0, 1, 2))
    together = run(whole, grader, GateConfig(threshold=0))
    assert whole.seeds == [SEED]  # all are needed: one request
    assert single == together


@pytest.mark.parametrize("gate", [GateConfig(threshold=-1), GateConfig(soft=True)])
def test_other_gates_have_one_request_a_prompt(graders, tokenizer, answers, gate: GateConfig) -> None:
    server = Server(tokens=answers())
    assert run(server, Grader(graders, tokenizer), gate).cancelled == 0
    assert server.seeds == [SEED]


def test_a_prompt_without_a_demonstration_needs_all_its_rollouts(graders, tokenizer, answers) -> None:
    server = Server(tokens=answers())
    prompt = Prompt("p", [5, 6], None, "7", "")
    assert run(server, Grader(graders, tokenizer), GateConfig(threshold=2), prompt).cancelled == 0
    assert server.seeds == [SEED]
    skipped = run(Server(slow_s=slow(0), tokens=answers()), Grader(graders, tokenizer), SKIP, prompt)
    assert skipped.cancelled >= 1


SKIP = GateConfig(threshold=2, missing_demonstration="skip")


def test_an_engine_that_fails_is_not_taken_for_one_that_was_cancelled(graders, tokenizer) -> None:
    with pytest.raises(EngineError, match="out of memory"):
        run(Server(fails=True), Grader(graders, tokenizer), GateConfig(threshold=2))


@pytest.mark.parametrize("demonstrations", [False, True])
def test_a_prompt_without_rollouts_has_no_rewards(graders, tokenizer, demonstrations: bool) -> None:
    """As of sft: transformers decodes no responses at all to one empty text."""
    (group,) = asyncio.run(grade([Group(PROMPT)], Grader(graders, tokenizer), demonstrations))
    assert (list(group.rewards), group.demonstration_reward) == ([], 0.0 if demonstrations else None)
