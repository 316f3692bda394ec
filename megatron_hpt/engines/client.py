"""The base of all clients: requests with deadlines, and errors that name the server."""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Sequence
from http import HTTPStatus
from typing import Any

import aiohttp
import httpx
import msgspec

from megatron_hpt.config import Config
from megatron_hpt.engines.types import OWN, Sample, SamplingRequest, Span
from megatron_hpt.errors import DeadlineError, EngineError, EngineGone, RequestAborted
from megatron_hpt.process import token_header
from megatron_hpt.transfer.manifest import as_version

CONNECTIONS = 256
"""Requests that a client has under way at once, or `rollout.max_running` if that is more; others wait in the client."""


def connections_of(config: Config) -> int:
    """Return how many requests the client of a server of a run has under way at once."""
    return max(CONNECTIONS, config.rollout.max_running)


def answer_of(http: httpx.Client, route: str) -> Any:
    """Return a server's JSON answer to a GET request, or None if the server has no such route.

    Called where an engine recognises its servers (`EngineKind.recognise`).

    Raises:
        EngineError: the server refuses to answer.
        httpx.HTTPError: the server cannot be reached.
    """
    answer = http.get(route)
    if answer.status_code == HTTPStatus.NOT_FOUND:
        return None
    if answer.status_code != HTTPStatus.OK:
        hint = " (set HPT_TOKEN)" if answer.status_code == HTTPStatus.UNAUTHORIZED else ""
        raise EngineError(f"{http.base_url} refused {route} ({answer.status_code}){hint}: {answer.text[:200]}")
    return answer.json()


class HttpEngine:
    """The client of one running server; implements `types.Engine`.

    A subclass of each engine names its routes, and implements `body`, `samples` and, with a `progress_route`, `progress_of`.
    """

    answer_type: Any = Any
    """Type that msgspec reads the engine's JSON answer as. With structs that have no more fields than `samples` reads, it is
    parsed several times faster than into dicts and lists."""
    accept = "application/json"
    """Content types in which an answer to `generate_route` may come, as an HTTP header; other than JSON `read` must read."""
    generate_route: str
    version_route: str
    progress_route: str | None = None
    """Route whose answer `progress_of` reads; None if the engine has no such route."""

    def __init__(
        self, url: str, deadline_s: float, silent_s: float, connections: int = CONNECTIONS, own: str | None = None
    ) -> None:
        """
        Args:
            deadline_s: seconds for a request (`deadlines.rollout_s`).
            silent_s: seconds for an answer to `health`, `version` or `progress` (`deadlines.silent_s`).
            connections: requests under way at once.
            own: label of the weights of the folder that the server was started with, which then are version `OWN`. Without it
                only weights that were sent have a version: their labels are numbers.
        """
        self.url, self._own = url, own
        self._decoder = msgspec.json.Decoder(self.answer_type)
        self._http = self._session(connections, deadline_s)
        self._questions = self._session(1, silent_s)  # their own connection: requests may use up all of theirs

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt; a call that is cancelled closes its connection, which aborts the request in the engine.

        Raises:
            EngineError: the server failed, or its answer is incomplete or from weights of no version.
            EngineGone: nobody answers.
            DeadlineError: the answer did not come within `deadline_s`.
        """
        accept = {"Accept": self.accept}
        content, kind = await self._ask(self._http, "POST", self.generate_route, json=self.body(request), headers=accept)
        try:
            # In the event loop, because the parser holds the interpreter's lock: in a thread it would stop the loop as long.
            samples = self.read(content, kind)
        except (msgspec.MsgspecError, ValueError, LookupError, TypeError, OverflowError) as error:
            raise EngineError(f"engine {self.url} answered a request with what cannot be read: {error!r}") from None
        if len(samples) != request.samples:
            raise EngineError(f"engine {self.url} answered {len(samples)} samples; {request.samples} were asked for")
        return samples

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        """Return the JSON body of a request, as the engine reads it."""
        raise NotImplementedError

    def read(self, content: bytes, kind: str) -> list[Sample]:
        """Return the samples of an answer to `generate_route`. Raises as `samples`, or `msgspec.MsgspecError`.

        Args:
            kind: its content type.
        """
        return self.samples(self._decoder.decode(content))

    def samples(self, answer: Any) -> list[Sample]:
        """Return the samples of an answer, each by `whole_sample`; LookupError, TypeError or ValueError is a bad answer.

        Args:
            answer: of `answer_type`.
        """
        raise NotImplementedError

    async def health(self) -> None:
        """Return if the server is well.

        Raises:
            EngineError: the server cannot be reached, or its engine is dead.
            DeadlineError: the answer did not come within `silent_s`.
        """
        await self._ask(self._questions, "GET", "/health")

    async def version(self) -> int | None:
        """Return the version of the weights that the server serves, or None before its first.

        Raises:
            EngineError: the server cannot be reached, or fails.
            DeadlineError: the answer did not come within `silent_s`.
        """
        return self._version_of(await self.label())

    async def progress(self) -> Hashable:
        """Return a value that changes with the tokens that the server produces, or None. Raises as `version`."""
        if self.progress_route is None:
            return None
        answer, _ = await self._ask(self._questions, "GET", self.progress_route)
        try:
            return self.progress_of(answer)
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(f"engine {self.url} answered {self.progress_route} with what cannot be read: {error!r}") from None

    def progress_of(self, answer: bytes) -> Hashable:
        """Return what `progress` returns, read from the server's answer at `progress_route`."""
        raise NotImplementedError

    async def label(self) -> str:
        """Return the label of the server's weights: the version that was sent, or a word before that. Raises as `version`."""
        answer, _ = await self._ask(self._questions, "GET", self.version_route)
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
        # A new connection for each request: the servers close idle ones after 5 s, and a training step lasts longer.
        connector = aiohttp.TCPConnector(limit=connections, force_close=True)
        timeout = aiohttp.ClientTimeout(total=deadline_s)
        return aiohttp.ClientSession(self.url, timeout=timeout, connector=connector, headers=token_header())

    async def _ask(self, session: aiohttp.ClientSession, method: str, route: str, **options: Any) -> tuple[bytes, str]:
        """Return the content of an answer and its type."""
        try:
            async with session.request(method, route, **options) as response:
                answer = await response.read()
        except TimeoutError:
            late, setting = session.timeout.total, "rollout_s" if session is self._http else "silent_s"
            raise DeadlineError(f"engine {self.url} did not answer {route} within {late:g} s (deadlines.{setting})") from None
        except aiohttp.ClientError as error:
            raise EngineGone(f"engine {self.url} cannot be reached: {type(error).__name__} {error}") from None
        if response.status != HTTPStatus.OK:
            text = answer.decode(errors="replace")[:500]
            raise EngineError(f"engine {self.url} refused {route} ({response.status}): {text}")
        return answer, response.content_type

    def whole_sample(
        self, tokens: Sequence[int], logprobs: Sequence[float], finish_reason: str, spans: Sequence[Span] | None
    ) -> Sample:
        """Return a sample, if it is complete and weights of known versions made all of it.

        Args:
            spans: the labels of the weights that sampled its tokens, in order; None where the engine does not say.

        Raises:
            RequestAborted: the engine ended the request.
            EngineError: the sample is incomplete, or weights of no version made some of it.
        """
        if finish_reason == "abort":
            raise RequestAborted(
                f"engine {self.url} ended a request before it was whole, as it does for new weights under "
                "transfer.in_flight=abort: with keep or recompute requests go on"
            )
        if len(logprobs) != len(tokens) or not len(tokens):
            raise EngineError(f"engine {self.url} answered {len(tokens)} tokens with {len(logprobs)} log-probabilities")
        versions = [self._version_of(span.version) for span in spans or ()]
        if not versions or None in versions:
            labels = sorted({span.version for span in spans or ()})
            raise EngineError(f"engine {self.url} sampled one response with weights {labels or 'of no version'}")
        bounds = [*(span.start for span in spans), len(tokens)]
        counts = [end - start for start, end in itertools.pairwise(bounds)]
        if bounds[0] != 0 or min(counts) < 1:
            raise EngineError(f"engine {self.url} answered {len(tokens)} tokens; the weights' spans begin at {bounds[:-1]}")
        if finish_reason not in ("stop", "length"):
            raise EngineError(f"engine {self.url} ended a response with {finish_reason!r}; it is not whole")
        return Sample(tokens, logprobs, finish_reason, tuple(zip(versions, counts, strict=True)))
