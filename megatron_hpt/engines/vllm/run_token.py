"""Requires the run's token for every route of a vLLM server; vLLM's own key guards sampling, not the changes of weights."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_hpt.process import TOKEN_VARIABLE, token_header

OPEN = ("/health", "/metrics", "/ping")
"""Routes that reveal nothing and change nothing; they need no token."""


class RequireRunToken:
    """ASGI middleware that answers 401 to requests without ``Authorization: Bearer <HPT_TOKEN>``.

    Named on the server's command line (``--middleware``). Where the environment has no token, every request passes.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = header.encode() if (header := token_header().get("Authorization")) else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and self._expected is not None and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                await _refuse(scope["type"], send)
                return
        await self._app(scope, receive, send)


async def _refuse(kind: str, send: Any) -> None:
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": f"this server wants the run's token ({TOKEN_VARIABLE})".encode()})
