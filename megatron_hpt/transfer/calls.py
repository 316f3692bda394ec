"""One call of an engine's HTTP API, whose server may die before, during or after it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from megatron_hpt.errors import DeadlineError, EngineGone, TransferError
from megatron_hpt.listening import refuses
from megatron_hpt.process import token_header

WATCH_S = 1.0
"""Seconds between two looks at a server that has not answered yet."""


class Calls:
    """Calls of one server, from any thread without an event loop.

    A vLLM server whose engine process dies leaves the calls that wait for it unanswered (`megatron_hpt.listening`). So a call
    that waits looks every `WATCH_S` seconds whether somebody still listens.
    """

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url, self._deadline_s = url, deadline_s
        self._certificates = httpx.create_ssl_context(trust_env=False)

    def ask(self, method: str, route: str, **request: Any) -> httpx.Response:
        """Make one call and return the answer, whose status is 200.

        Raises:
            TransferError: another status; the message carries the engine's own words.
            EngineGone: nobody answers, or the server's engine has died.
            DeadlineError: the answer did not come in time.
        """
        try:
            response = asyncio.run(self._ask(method, route, **request))
        except httpx.TimeoutException:
            raise DeadlineError(f"engine {self.url} did not answer {route} within {self._deadline_s:g} s") from None
        except httpx.HTTPError as error:
            raise EngineGone(f"engine {self.url} cannot be reached for {route}: {error}") from None
        if response.status_code != httpx.codes.OK:
            words = f"engine {self.url} failed {route} ({response.status_code}): {_words(response)}"
            # A server whose engine process died still answers for a while.
            raise (TransferError if response.is_client_error or self._is_well() else EngineGone)(words)
        return response

    async def _ask(self, method: str, route: str, **request: Any) -> httpx.Response:
        # No connection is kept: the servers close idle ones after 5 s, and a training step lasts longer.
        client = httpx.AsyncClient(
            base_url=self.url,
            timeout=self._deadline_s,
            trust_env=False,
            verify=self._certificates,
            headers=token_header(),
        )
        async with client:
            asking = asyncio.create_task(client.request(method, route, **request))
            while not asking.done():
                await asyncio.wait([asking], timeout=WATCH_S)
                if not asking.done() and await asyncio.to_thread(refuses, self.url):
                    asking.cancel()
                    await asyncio.wait([asking])
                    raise httpx.ConnectError("its server stopped listening before it answered")
            return asking.result()

    def _is_well(self) -> bool:
        try:
            answer = httpx.get(
                f"{self.url}/health",
                timeout=min(5.0, self._deadline_s),
                trust_env=False,
                verify=self._certificates,
                headers=token_header(),
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK


def _words(response: httpx.Response) -> str:
    """Return an engine's error without the JSON around it."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:2000]
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:2000]
