"""vLLM as a rollout engine: how its server is started, and its token-in, token-out route.

Written against vLLM 0.32 (``/inference/v1/generate``, vllm/entrypoints/scale_out/token_in_token_out).
"""

from __future__ import annotations

import json
import os
import sys
from http import HTTPStatus
from typing import Any

import aiohttp

from megatron_hpt.config import Config
from megatron_hpt.errors import DeadlineError, EngineError
from megatron_hpt.rollout.engine import Sample, SamplingRequest


def server_command(config: Config, port: int) -> list[str]:
    """Command line of a server that waits for its first weights."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", config.model.path, "--served-model-name", config.name),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", config.model.dtype, "--tensor-parallel-size", str(config.rollout.tensor_parallel)),
        *("--max-model-len", str(config.max_sequence_length), "--max-num-seqs", str(config.rollout.max_running)),
        # vLLM 0.32 rewinds a seeded request's generator when it cuts a prompt in two, which the CPU generator cannot do.
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4096, config.max_sequence_length))),
        # Weights come from the trainer before the first request, so none are read here.
        *("--load-format", "dummy", "--weight-transfer-config", json.dumps({"backend": "megatron_hpt"})),
        # The log-probabilities of the distribution that was sampled from, temperature and nucleus applied.
        *("--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm", "--skip-tokenizer-init", "--enable-scale-out", "--enforce-eager"),
        *("--disable-uvicorn-access-log", "--seed", str(config.trainer.seed)),
    ]


def server_environment(config: Config) -> dict[str, str]:
    """Environment of the server, on top of this process's."""
    return {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",  # exposes the weight-update routes; the server listens on loopback only
        "VLLM_PLUGINS": "megatron_hpt",
        "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


CONNECTIONS = 256
"""Requests under way at once, unless the server decodes more sequences at the same time; further ones wait here."""


class VllmEngine:
    """One running server."""

    def __init__(self, url: str, deadline_s: float, health_s: float, connections: int = CONNECTIONS) -> None:
        """
        Args:
            deadline_s: for a request.
            health_s: for the questions how the server is and which weights it serves.
            connections: requests under way at once.
        """
        self.url = url
        self._http = self._session(connections, deadline_s)
        self._questions = self._session(1, health_s)  # their own connection: requests may use up all of theirs

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt.

        Raises:
            EngineError: the server failed, or its answer is incomplete or mixes versions.
            DeadlineError: no answer in time.
        """
        body = {
            "token_ids": request.tokens,
            "sampling_params": {
                "n": request.samples,
                "seed": request.seed,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "stop_token_ids": [request.stop_token],
                "logprobs": 0,
                "detokenize": False,
            },
        }
        answer = await self._ask(self._http, "POST", "/inference/v1/generate", json=body)
        try:
            samples = [self._sample(choice) for choice in json.loads(answer)["choices"]]
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered a request with what cannot be read: {error!r}") from None
        if len(samples) != request.samples:
            raise EngineError(f"engine {self.url} answered {len(samples)} samples; {request.samples} were asked for")
        return samples

    async def health(self) -> None:
        """Ask whether the server is well.

        Raises:
            EngineError: it cannot be reached, or its engine is dead.
            DeadlineError: no answer in time.
        """
        await self._ask(self._questions, "GET", "/health")

    async def version(self) -> int | None:
        """Version of the weights that it serves; None before its first.

        Raises:
            EngineError: it cannot be reached, or fails.
            DeadlineError: no answer in time.
        """
        answer = await self._ask(self._questions, "GET", "/weight_info")
        try:
            version = str(json.loads(answer)["weight_version"])
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered /weight_info with what cannot be read: {error!r}") from None
        return int(version) if version.isdecimal() else None

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()
        await self._questions.close()

    def _session(self, connections: int, deadline_s: float) -> aiohttp.ClientSession:
        # A connection a request: the server closes idle ones after 5 s, and a training step lasts longer.
        connector = aiohttp.TCPConnector(limit=connections, force_close=True)
        return aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(total=deadline_s), connector=connector)

    async def _ask(self, session: aiohttp.ClientSession, method: str, route: str, **content: Any) -> bytes:
        try:
            async with session.request(method, route, **content) as response:
                answer = await response.read()
        except TimeoutError:
            late = session.timeout.total
            raise DeadlineError(f"engine {self.url} did not answer {route} within {late:g} s") from None
        except aiohttp.ClientError as error:
            raise EngineError(f"engine {self.url} cannot be reached: {type(error).__name__} {error}") from None
        if response.status != HTTPStatus.OK:
            text = answer.decode(errors="replace")[:500]
            raise EngineError(f"engine {self.url} refused {route} ({response.status}): {text}")
        return answer

    def _sample(self, choice: dict[str, Any]) -> Sample:
        tokens = choice["token_ids"]
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        versions = {span["version"] for span in choice["weight_versions"] or ()}
        if len(logprobs) != len(tokens) or not tokens:
            raise EngineError(f"engine {self.url} answered {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        if len(versions) != 1 or not min(versions).isdecimal():
            raise EngineError(f"engine {self.url} sampled one response with weights {sorted(versions) or 'of no version'}")
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineError(f"engine {self.url} ended a response with {choice['finish_reason']!r}; it is not whole")
        return Sample(tokens, logprobs, choice["finish_reason"], int(min(versions)))
