"""The client of a vLLM server as anybody starts it (``vllm serve``): OpenAI's completions, with token ids in and out.

Written against vLLM 0.32 (vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

from typing import Any

import msgspec

from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.types import Sample, SamplingRequest, Span

UNLABELLED = "the server's own"
"""Label of the weights of a server that has no route for it; such a server cannot be sent other weights either."""


class _Logprobs(msgspec.Struct, gc=False):
    token_logprobs: list[float]


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str


class _Answer(msgspec.Struct, gc=False):
    """What is read of a CompletionResponse."""

    choices: list[_Choice]


class CompletionsEngine(HttpEngine):
    """The client of one server whose weights stay those that were found when it was recognised: version `OWN`.

    Args:
        model: name under which the server offers its model.
        own: label of the weights, or `UNLABELLED`.
    """

    answer_type = _Answer
    generate_route = "/v1/completions"
    version_route = "/weight_info"

    def __init__(self, url: str, deadline_s: float, silent_s: float, model: str, own: str) -> None:
        super().__init__(url, deadline_s, silent_s, own=own)
        self._model = model

    async def label(self) -> str:
        return UNLABELLED if self._own == UNLABELLED else await super().label()

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        # Every parameter is given, because the server would take missing ones from the model's generation_config.json.
        return {
            "model": self._model,
            "prompt": request.tokens,
            "n": request.samples,
            "seed": request.seed,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": request.max_tokens,
            "stop_token_ids": [request.stop_token],
            "logprobs": 0,
            "return_token_ids": True,
        }

    def samples(self, answer: _Answer) -> list[Sample]:
        own = [Span(str(self._own), 0)]
        return [
            self.whole_sample(choice.token_ids, choice.logprobs.token_logprobs, choice.finish_reason, own)
            for choice in answer.choices
        ]
