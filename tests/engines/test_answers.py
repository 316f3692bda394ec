"""What the clients read of the engines' answers, and the packed form of vLLM's."""

import asyncio
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.sglang.server import SglangEngine
from megatron_hpt.engines.types import Sample
from megatron_hpt.engines.vllm.answers import PACKED, PackAnswers
from megatron_hpt.engines.vllm.completions import CompletionsEngine
from megatron_hpt.engines.vllm.server import VllmEngine
from megatron_hpt.errors import EngineError

FLOATS = st.floats(-9999.0, 0.0, width=32)
RESPONSES = st.lists(st.tuples(st.integers(0, 2**31 - 1), FLOATS), min_size=1, max_size=30)
ANSWERS = st.lists(st.tuples(RESPONSES, st.sampled_from(["stop", "length"])), min_size=1, max_size=4)


def vllm_answer(responses: list) -> dict[str, Any]:
    """As vLLM 0.32 makes it: GenerateResponse with logprobs=0."""
    choices = []
    for index, (response, reason) in enumerate(responses):
        entries = [{"token_id": token, "logprob": logprob, "rank": 3} for token, logprob in response]
        choices.append(
            {
                "index": index,
                "finish_reason": reason,
                "stop_reason": None,
                "token_ids": [token for token, _ in response],
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": [{"version": "3", "start": 0, "end": len(response)}],
                "logprobs": {"content": [{**entry, "top_logprobs": [entry]} for entry in entries]},
            }
        )
    return {"request_id": "x", "choices": choices, "prompt_logprobs": None, "usage": {"total_tokens": 7}}


def sglang_answer(responses: list) -> list[dict[str, Any]]:
    return [
        {
            "output_ids": [token for token, _ in response],
            "meta_info": {
                "id": "x",
                "finish_reason": {"type": reason, "matched": 2},
                "output_token_logprobs": [[logprob, token, None] for token, logprob in response],
                "weight_versions": [{"version": "3", "start": 0, "end": len(response)}],
                "weight_version": "3",
            },
        }
        for response, reason in responses
    ]


def completions_answer(responses: list) -> dict[str, Any]:
    choices = [
        {
            "token_ids": [token for token, _ in response],
            "logprobs": {"token_logprobs": [logprob for _, logprob in response], "tokens": ["a"] * len(response)},
            "finish_reason": reason,
            "text": "é\\u0000",
        }
        for response, reason in responses
    ]
    return {"id": "x", "choices": choices}


def expected(responses: list) -> list[Sample]:
    """What Python's own parser gives, as arrays."""
    read = json.loads(json.dumps(responses))
    return [Sample([t for t, _ in pairs], [x for _, x in pairs], reason, ((3, len(pairs)),)) for pairs, reason in read]


def read(make: type[HttpEngine], arguments: tuple, content: bytes, kind: str = "application/json") -> list[Sample]:
    async def action() -> list[Sample]:
        engine = make("http://127.0.0.1:9", 1.0, 1.0, *arguments)
        try:
            return engine.read(content, kind)
        finally:
            await engine.close()

    return asyncio.run(action())


@pytest.mark.parametrize(
    ("make", "arguments", "answer"),
    [
        (VllmEngine, (), vllm_answer),
        (SglangEngine, (2**31,), sglang_answer),
        (CompletionsEngine, ("m", "own"), completions_answer),
    ],
)
def test_every_number_is_what_the_engine_wrote(make, arguments, answer) -> None:
    @given(responses=ANSWERS)
    def check(responses: list) -> None:
        found = read(make, arguments, json.dumps(answer(responses)).encode())
        if make is CompletionsEngine:  # its server's own weights
            found = [Sample(s.tokens, s.logprobs, s.finish_reason, tuple((v + 3, n) for v, n in s.spans)) for s in found]
        assert found == expected(responses)

    check()


async def through(answer: bytes, accept: str, status: int = 200, pieces: int = 1) -> tuple[dict[str, Any], bytes]:
    """What a server with the middleware sends: the start of the response and its body."""
    sent: list[dict[str, Any]] = []

    async def application(scope: dict, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        bounds = [len(answer) * i // pieces for i in range(pieces + 1)]
        for i in range(pieces):
            part = answer[bounds[i] : bounds[i + 1]]
            await send({"type": "http.response.body", "body": part, "more_body": i + 1 < pieces})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await PackAnswers(application)({"type": "http", "headers": [(b"accept", accept.encode())]}, None, send)
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    headers, body = dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])
    assert headers[b"content-length"] == str(len(body)).encode()
    return {**sent[0], "kind": headers[b"content-type"].decode()}, body


@given(responses=ANSWERS, pieces=st.integers(1, 3))
def test_a_packed_answer_has_the_same_samples(responses: list, pieces: int) -> None:
    start, body = asyncio.run(through(json.dumps(vllm_answer(responses)).encode(), VllmEngine.accept, pieces=pieces))
    assert (start["status"], start["kind"]) == (200, PACKED)
    assert read(VllmEngine, (), body, start["kind"]) == expected(responses)
    assert len(body) <= sum(8 * len(response) + 100 for response, _ in responses)


def test_what_is_no_answer_and_who_does_not_ask_get_what_vllm_says() -> None:
    good, other = json.dumps(vllm_answer([([(5, -0.5)], "stop")])).encode(), b'{"choices": [{"index": 0}]}'
    for content, accept, status in ((good, "*/*", 200), (other, VllmEngine.accept, 200), (good, VllmEngine.accept, 400)):
        start, body = asyncio.run(through(content, accept, status))
        assert (start["status"], start["kind"], body) == (status, "application/json", content)


def test_a_packed_answer_that_is_cut_off_is_refused() -> None:
    tokens, logprobs = np.arange(3, dtype=np.int32), np.zeros(3, np.float32)
    answer = {"token_ids": tokens.tobytes(), "logprobs": logprobs.tobytes(), "finish_reason": "stop"}
    spans = [{"version": "3", "start": 0}]
    whole = msgspec.msgpack.encode({"choices": [{**answer, "weight_versions": spans}]})
    assert read(VllmEngine, (), whole, PACKED)[0].tokens.tolist() == [0, 1, 2]
    with pytest.raises(msgspec.DecodeError):
        read(VllmEngine, (), whole[:-1], PACKED)
    short = msgspec.msgpack.encode({"choices": [{**answer, "logprobs": b"\0" * 8, "weight_versions": spans}]})
    with pytest.raises(EngineError, match="3 tokens with 2 log-probabilities"):
        read(VllmEngine, (), short, PACKED)


@pytest.mark.slow  # imports vLLM
def test_vllms_own_response_is_packed_behind_its_own_middleware() -> None:
    """vLLM's classes make the answer, and Starlette calls the middleware as in vLLM's server."""
    pytest.importorskip("vllm")
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.testclient import TestClient
    from vllm.entrypoints.scale_out.token_in_token_out import protocol, serving
    from vllm.logprobs import Logprob
    from vllm.outputs import WeightVersionSpan

    app, tokens = FastAPI(), [5, 9]
    top = [{5: Logprob(-0.5, 1)}, {9: Logprob(float("-inf"), 4)}]

    @app.post("/inference/v1/generate")
    async def generate(request: Request) -> JSONResponse:
        logprobs = serving.ServingTokens._create_tokens_logprobs(None, tokens, top, 0)
        spans = [WeightVersionSpan("3", 0, 1), WeightVersionSpan("4", 1, 2)]
        choice = protocol.GenerateTokensChoice(
            index=0, logprobs=logprobs, finish_reason="length", token_ids=tokens, weight_versions=spans
        )
        response = protocol.GenerateTokensResponse(choices=[choice], prompt_logprobs=None)
        return JSONResponse(content=response.model_dump())

    app.add_middleware(PackAnswers)
    client = TestClient(app)
    for accept, kind in ((VllmEngine.accept, PACKED), ("application/json", "application/json")):
        answer = client.post("/inference/v1/generate", headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        (sample,) = read(VllmEngine, (), answer.content, kind)
        assert sample == Sample([5, 9], [-0.5, -9999.0], "length", ((3, 1), (4, 1)))
