"""What the client of the engine refuses: a server that answers wrongly, late, or not at all."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from aiohttp import web

from megatron_hpt.engines.types import Sample, SamplingRequest, seed_of
from megatron_hpt.engines.vllm.server import VllmEngine
from megatron_hpt.errors import DeadlineError, EngineError

REQUEST = SamplingRequest([1, 2], 1, 3, 1.0, 1.0, 4, 0)


def choice(tokens=(5, 6), logprobs=(-0.5, -0.25), versions=("3",), starts=(0, 1)) -> dict:
    entries = [{"token_id": token, "logprob": x, "rank": 1} for token, x in zip(tokens, logprobs, strict=False)]
    return {
        "index": 0,
        "token_ids": list(tokens),
        "logprobs": {"content": [{**entry, "top_logprobs": [entry]} for entry in entries]},
        "weight_versions": [{"version": v, "start": start, "end": 2} for v, start in zip(versions, starts, strict=False)],
        "finish_reason": "stop",
    }


def ask(answer: Callable, action: Callable, deadline_s: float = 5.0):
    """Run `action(engine)` against a server whose generate route is `answer`."""

    async def run():
        app = web.Application()
        app.router.add_post("/inference/v1/generate", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = VllmEngine(f"http://127.0.0.1:{runner.addresses[0][1]}", deadline_s, silent_s=0.3)
        try:
            return await action(engine)
        finally:
            await engine.close()
            await runner.cleanup()

    return asyncio.run(run())


def answering(*choices: dict) -> Callable:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"choices": list(choices)})

    return answer


def test_tokens_log_probabilities_and_version_come_through() -> None:
    (found,) = ask(answering(choice()), lambda engine: engine.generate(REQUEST))
    assert found == Sample([5, 6], [-0.5, -0.25], "stop", ((3, 2),))
    assert (found.tokens.dtype, found.logprobs.dtype, found.version) == (np.int32, np.float32, 3)


def test_a_sample_of_several_versions_says_how_many_tokens_each_sampled() -> None:
    mixed = choice((5, 6, 7, 8, 9), (-0.5,) * 5, versions=("3", "4", "6"), starts=(0, 1, 4))
    (found,) = ask(answering(mixed), lambda engine: engine.generate(REQUEST))
    assert (found.spans, found.version) == (((3, 1), (4, 3), (6, 1)), 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (choice(versions=("default", "4")), r"sampled one response with weights \['4', 'default'\]"),
        (choice(versions=("default",)), "sampled one response with weights"),
        (choice(versions=()), "of no version"),
        ({**choice(), "weight_versions": None}, "of no version"),
        (choice(versions=("3", "4"), starts=(0, 2)), r"2 tokens; the weights' spans begin at \[0, 2\]"),
        (choice(versions=("3", "4"), starts=(0, 0)), "2 tokens; the weights' spans"),
        (choice(versions=("3",), starts=(1,)), "2 tokens; the weights' spans"),
        (choice(logprobs=(-0.5,)), "2 tokens with 1 log-probabilities"),
        (choice(tokens=(), logprobs=()), "0 tokens"),
        ({**choice(), "finish_reason": "abort"}, "ended a request before it was whole"),
        ({**choice(), "logprobs": None}, "what cannot be read"),
        (choice(logprobs=(-0.5, None)), "what cannot be read"),
        (choice(tokens=(5, 2**31)), "what cannot be read"),
        (choice(tokens=(5, "6")), "what cannot be read"),
    ],
)
def test_a_wrong_answer_is_refused(bad: dict, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        ask(answering(bad), lambda engine: engine.generate(REQUEST))


def test_fewer_samples_than_asked_for_are_refused() -> None:
    with pytest.raises(EngineError, match="answered 2 samples; 1 were asked for"):
        ask(answering(choice(), choice()), lambda engine: engine.generate(REQUEST))


@pytest.mark.slow
def test_a_refusal_and_a_late_answer_are_typed() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=400, text="prompt too long")

    async def sleep(request: web.Request) -> web.Response:
        await asyncio.sleep(3)
        return web.Response()

    with pytest.raises(EngineError, match=r"refused /inference/v1/generate \(400\): prompt too long"):
        ask(refuse, lambda engine: engine.generate(REQUEST))
    with pytest.raises(DeadlineError, match=r"did not answer /inference/v1/generate within 0\.3 s"):
        ask(sleep, lambda engine: engine.generate(REQUEST), deadline_s=0.3)


def test_an_engine_that_is_gone_is_typed() -> None:
    async def ask_nobody():
        engine = VllmEngine("http://127.0.0.1:9", 1.0, 1.0)
        try:
            await engine.generate(REQUEST)
        finally:
            await engine.close()

    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 cannot be reached"):
        asyncio.run(ask_nobody())


def test_seeds_differ_and_stay() -> None:
    seeds = {seed_of(0, "train", step, place) for step in range(50) for place in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(0, "train", 1, 2) == seed_of(0, "train", 1, 2) == 1015039911
