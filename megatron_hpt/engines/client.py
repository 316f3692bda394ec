"""What the clients of both engines share: requests with deadlines, and errors that name the engine."""

from __future__ import annotations

import json
from collections.abc import Hashable
from http import HTTPStatus
from typing import Any

import aiohttp
import httpx

from megatron_hpt.config import Config
from megatron_hpt.engines.types import OWN, Sample, SamplingRequest
from megatron_hpt.errors import DeadlineError, EngineError, EngineGone
from megatron_hpt.process import token_header
from megatron_hpt.transfer.manifest import as_version

CONNECTIONS = 256
"""Requests under way at once, unless the server decodes more sequences at the same time; further ones wait here."""


def connections_of(config: Config) -> int:
    """Requests under way at once to a server of a run."""
    return max(CONNECTIONS, config.rollout.max_running)


def answer_of(http: httpx.Client, route: str) -> Any:
    """What a server answers to a question by JSON; None: it has no such route.

    Raises:
        EngineError: it refuses.
        httpx.HTTPError: it cannot be reached.
    """
    answer = http.get(route)
    if answer.status_code == HTTPStatus.NOT_FOUND:
        return None
    if answer.status_code != HTTPStatus.OK:
        hint = " (set HPT_TOKEN)" if answer.status_code == HTTPStatus.UNAUTHORIZED else ""
        raise EngineError(f"{http.base_url} refused {route} ({answer.status_code}){hint}: {answer.text[:200]}")
    return answer.json()


class HttpEngine:
    """One running server. An engine's own client says where its routes are and what goes over them."""

    generate_route: str
    version_route: str
    progress_route: str | None = None
    """Where it tells how far it has come; None: nowhere."""

    def __init__(
        self, url: str, deadline_s: float, silent_s: float, connections: int = CONNECTIONS, own: str | None = None
    ) -> None:
        """
        Args:
            deadline_s: for a request (`deadlines.rollout_s`).
            silent_s: for an answer to how the server is, which weights it serves, and how far it has come
                (`deadlines.silent_s`).
            connections: requests under way at once.
            own: label of weights that nobody has sent: those of the folder that the server was started with. They are
                version `OWN`; None: only sent weights, whose labels are numbers, have a version.
        """
        self.url, self._own = url, own
        self._http = self._session(connections, deadline_s)
        self._questions = self._session(1, silent_s)  # their own connection: requests may use up all of theirs

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt; cancelling it closes the connection, which aborts the request in the engine.

        Raises:
            EngineError: the server failed, or its answer is incomplete or mixes versions.
            EngineGone: nobody answers.
            DeadlineError: no answer in time.
        """
        answer = await self._ask(self._http, "POST", self.generate_route, json=self.body(request))
        try:
            samples = self.samples(json.loads(answer))
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered a request with what cannot be read: {error!r}") from None
        if len(samples) != request.samples:
            raise EngineError(f"engine {self.url} answered {len(samples)} samples; {request.samples} were asked for")
        return samples

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        """The engine's form of a request."""
        raise NotImplementedError

    def samples(self, answer: Any) -> list[Sample]:
        """Our form of its answer."""
        raise NotImplementedError

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
        return self._version_of(await self.label())

    async def progress(self) -> Hashable:
        """Something that changes with the tokens that the server produces; None: it does not tell. Raises as `version`."""
        if self.progress_route is None:
            return None
        answer = await self._ask(self._questions, "GET", self.progress_route)
        try:
            return self.progress_of(answer)
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered {self.progress_route} with what cannot be read: {error!r}") from None

    def progress_of(self, answer: bytes) -> Hashable:
        """What `progress` returns, from the server's answer."""
        raise NotImplementedError

    async def label(self) -> str:
        """What the server calls its weights: the version that it was sent, or a word before that. Raises as `version`."""
        answer = await self._ask(self._questions, "GET", self.version_route)
        try:
            return str(json.loads(answer)["weight_version"])
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered {self.version_route} with what cannot be read: {error!r}") from None

    def _version_of(self, label: str) -> int | None:
        return OWN if label == self._own else as_version(label)

    async def close(self) -> None:
        """Close connections."""
        await self._http.close()
        await self._questions.close()

    def _session(self, connections: int, deadline_s: float) -> aiohttp.ClientSession:
        # A connection a request: the servers close idle ones after 5 s, and a training step lasts longer.
        connector = aiohttp.TCPConnector(limit=connections, force_close=True)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        return aiohttp.ClientSession(self.url, timeout=timeout, connector=connector, headers=token_header())

    async def _ask(self, session: aiohttp.ClientSession, method: str, route: str, **content: Any) -> bytes:
        try:
            async with session.request(method, route, **content) as response:
                answer = await response.read()
        except TimeoutError:
            late, setting = session.timeout.total, "rollout_s" if session is self._http else "silent_s"
            raise DeadlineError(f"engine {self.url} did not answer {route} within {late:g} s (deadlines.{setting})") from None
        except aiohttp.ClientError as error:
            raise EngineGone(f"engine {self.url} cannot be reached: {type(error).__name__} {error}") from None
        if response.status != HTTPStatus.OK:
            text = answer.decode(errors="replace")[:500]
            raise EngineError(f"engine {self.url} refused {route} ({response.status}): {text}")
        return answer

    def whole_sample(self, tokens: list[int], logprobs: list[float], finish_reason: str, versions: set[str]) -> Sample:
        """A sample, if it is one.

        Raises:
            EngineError: it is incomplete, or weights of several versions or of none made it.
        """
        if len(logprobs) != len(tokens) or not tokens:
            raise EngineError(f"engine {self.url} answered {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        if len(versions) != 1 or (version := self._version_of(min(versions))) is None:
            raise EngineError(f"engine {self.url} sampled one response with weights {sorted(versions) or 'of no version'}")
        if finish_reason not in ("stop", "length"):
            raise EngineError(f"engine {self.url} ended a response with {finish_reason!r}; it is not whole")
        return Sample(tokens, logprobs, finish_reason, version)
