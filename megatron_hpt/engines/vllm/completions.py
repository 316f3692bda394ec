"""A vLLM server as anybody starts it (``vllm serve``): OpenAI's completions, with token ids in and out.

Written against vLLM 0.32 (vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

from typing import Any

from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.types import Sample, SamplingRequest

UNLABELLED = "the server's own"
"""Label of the weights of a server that has no route to ask for it: nobody can send it others either."""


class CompletionsEngine(HttpEngine):
    """One running server whose weights stay what they are: those found when it was first asked, version `OWN`."""

    generate_route = "/v1/completions"
    version_route = "/weight_info"

    def __init__(self, url: str, deadline_s: float, silent_s: float, model: str, own: str) -> None:
        """
        Args:
            model: the name that the server gives it.
            own: label of the weights, or `UNLABELLED`.
        """
        super().__init__(url, deadline_s, silent_s, own=own)
        self._model = model

    async def label(self) -> str:
        return UNLABELLED if self._own == UNLABELLED else await super().label()

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        """Everything is said, since the server fills in what the model's generation_config.json has."""
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

    def samples(self, answer: Any) -> list[Sample]:
        return [
            self.whole_sample(
                choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"], {str(self._own)}
            )
            for choice in answer["choices"]
        ]
