"""Answers of vLLM's token-in, token-out route: what is read of its JSON, and the packed form that a run's own servers send.

vLLM writes 140 bytes of JSON for a token; packed it is 8 bytes, which need not be parsed. A middleware in the server packs
what it answers to clients that accept `PACKED`, so that this work is spread over the engines and not the one coordinator's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
import numpy as np

from megatron_hpt.engines.types import Span

PACKED = "application/x-hpt-samples"
"""Content type of a packed answer."""
_TOKEN, _LOGPROB = np.dtype("<i4"), np.dtype("<f4")


class _Logprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Logprob]


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str
    weight_versions: list[Span] | None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens, int32, and their log-probabilities, float32."""
        return np.array(self.token_ids, _TOKEN), np.array([entry.logprob for entry in self.logprobs.content], _LOGPROB)


class Answer(msgspec.Struct, gc=False):
    """What is read of a GenerateResponse (vllm/entrypoints/scale_out/token_in_token_out/protocol.py)."""

    choices: list[_Choice]


class _PackedChoice(msgspec.Struct, gc=False):
    token_ids: bytes
    logprobs: bytes
    finish_reason: str
    weight_versions: list[Span] | None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """As those of an `Answer`."""
        return np.frombuffer(self.token_ids, _TOKEN), np.frombuffer(self.logprobs, _LOGPROB)


class PackedAnswer(msgspec.Struct, gc=False):
    """An answer in msgpack, with arrays as their bytes."""

    choices: list[_PackedChoice]


_READ = msgspec.json.Decoder(Answer)


def pack(content: bytes) -> bytes:
    """Return vLLM's JSON answer packed.

    Raises:
        msgspec.MsgspecError, OverflowError: it is no `Answer`.
    """
    choices = []
    for choice in _READ.decode(content).choices:
        tokens, logprobs = (array.tobytes() for array in choice.arrays())
        choices.append(_PackedChoice(tokens, logprobs, choice.finish_reason, choice.weight_versions))
    return msgspec.msgpack.encode(PackedAnswer(choices))


class PackAnswers:
    """ASGI middleware that packs the answers to requests that accept `PACKED`.

    Named on the server's command line (``--middleware``). Refusals, and answers without tokens and log-probabilities, pass as
    they are.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and PACKED.encode() in dict(scope["headers"]).get(b"accept", b""):
            send = _Packing(send).send
        await self._app(scope, receive, send)


class _Packing:
    """Collects one response and sends it packed when it is whole."""

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._send = send
        self._start: dict[str, Any] = {}
        self._content = bytearray()

    async def send(self, message: dict[str, Any]) -> None:
        """Take the place of an ASGI application's ``send``."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._content += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish()
        else:
            await self._send(message)

    async def _finish(self) -> None:
        content, headers = bytes(self._content), dict(self._start.get("headers", ()))
        if self._start["status"] == HTTPStatus.OK:
            with contextlib.suppress(msgspec.MsgspecError, OverflowError):  # the client says what cannot be read
                content, headers = pack(content), {**headers, b"content-type": PACKED.encode()}
        headers[b"content-length"] = str(len(content)).encode()
        await self._send({**self._start, "headers": list(headers.items())})
        await self._send({"type": "http.response.body", "body": content})
