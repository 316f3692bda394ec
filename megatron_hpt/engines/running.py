"""Which engine answers at a URL, and whether it is well."""

from __future__ import annotations

from functools import cache
from http import HTTPStatus

import httpx

from megatron_hpt.engines.interface import RunningServer
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.errors import EngineError, EngineGone
from megatron_hpt.process import token_header


def look(url: str, deadline_s: float = 10.0) -> RunningServer:
    """Ask a server that somebody else has started what it is.

    Raises:
        EngineGone: nobody answers there.
        EngineError: it is a server of no engine in the table, or wants a token.
    """
    with httpx.Client(base_url=url, timeout=deadline_s, trust_env=False, headers=token_header()) as http:
        try:
            for kind in reversed(ENGINES.values()):  # vLLM's, the first row, takes any server that has OpenAI's routes
                if (server := kind.recognise(url, http)) is not None:
                    return server
        except httpx.HTTPError as error:
            raise EngineGone(f"{url} cannot be reached: {type(error).__name__} {error}") from None
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{url} answers as neither vLLM nor SGLang does: {error!r}") from None
    raise EngineError(f"{url} has neither /v1/models nor /model_info: it is neither a vLLM nor an SGLang server")


def is_healthy(url: str) -> bool:
    """Return whether a server says within 3 s that it is well. SGLang takes a second, in which it samples a token."""
    try:
        return _client().get(f"{url}/health", headers=token_header()).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


@cache
def _client() -> httpx.Client:
    """One client for all questions, because making one takes 30 ms. It keeps no connection: servers close idle ones."""
    return httpx.Client(timeout=3.0, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
