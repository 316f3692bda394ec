"""What the clients of both engines share: one request, its deadline, and errors that name the engine."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import aiohttp

from megatron_hpt.errors import DeadlineError, EngineError, EngineGone
from megatron_hpt.process import token_header
from megatron_hpt.rollout.engine import Sample, SamplingRequest

CONNECTIONS = 256
"""Requests under way at once, below the usual limit of 1024 open files; further ones wait here."""


class HttpEngine:
    """One running server."""

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url, self._deadline_s = url, deadline_s
        # A connection a request: the servers close idle ones after 5 s, and a training step lasts longer.
        connector = aiohttp.TCPConnector(limit=CONNECTIONS, force_close=True)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        self._http = aiohttp.ClientSession(url, timeout=timeout, connector=connector, headers=token_header())

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt; cancelling it closes the connection, which aborts the request in the engine.

        Raises:
            EngineError: the server failed, or its answer is incomplete or mixes versions.
            EngineGone: nobody answers.
            DeadlineError: no answer in time.
        """
        samples = self._samples(await self._ask("POST", self._route, json=self._body(request)))
        if len(samples) != request.samples:
            raise EngineError(f"engine {self.url} answered {len(samples)} samples; {request.samples} were asked for")
        return samples

    async def healthy(self, deadline_s: float) -> bool:
        """Whether the server answers its health route in time."""
        try:
            async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=deadline_s)) as response:
                return response.status == HTTPStatus.OK
        except (TimeoutError, aiohttp.ClientError):
            return False

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()

    _route: str
    """Where requests go."""

    def _body(self, request: SamplingRequest) -> dict[str, Any]:
        """The engine's form of a request."""
        raise NotImplementedError

    def _samples(self, answer: Any) -> list[Sample]:
        """Our form of its answer."""
        raise NotImplementedError

    async def _ask(self, method: str, route: str, **request: Any) -> Any:
        try:
            async with self._http.request(method, route, **request) as response:
                if response.status != HTTPStatus.OK:
                    text = (await response.text())[:500]
                    raise EngineError(f"engine {self.url} refused a request ({response.status}): {text}")
                return await response.json()
        except TimeoutError:
            raise DeadlineError(f"engine {self.url} did not answer a request within {self._deadline_s:g} s") from None
        except aiohttp.ClientError as error:
            raise EngineGone(f"engine {self.url} cannot be reached: {type(error).__name__} {error}") from None

    def _sample(self, tokens: list[int], logprobs: list[float], finish_reason: str, versions: set[str]) -> Sample:
        if len(logprobs) != len(tokens) or not tokens:
            raise EngineError(f"engine {self.url} answered {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        if len(versions) != 1 or not min(versions).isdecimal():
            raise EngineError(f"engine {self.url} sampled one response with weights {sorted(versions) or 'of no version'}")
        if finish_reason not in ("stop", "length"):
            raise EngineError(f"engine {self.url} ended a response with {finish_reason!r}; it is not whole")
        return Sample(tokens, logprobs, finish_reason, int(min(versions)))
