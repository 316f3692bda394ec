"""Servers that somebody else has started: what they are, and a client for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any

import httpx

from megatron_hpt.errors import EngineError, EngineGone
from megatron_hpt.process import token_header
from megatron_hpt.rollout.completions import UNLABELLED, CompletionsEngine
from megatron_hpt.rollout.http import HttpEngine
from megatron_hpt.rollout.sglang import SPARE, SglangEngine
from megatron_hpt.rollout.vllm import VllmEngine


@dataclass(frozen=True)
class Running:
    """A server that was found at a URL."""

    url: str
    kind: str
    """``vllm`` or ``sglang``."""
    served: str
    """The name that it gives the model."""
    model: str
    """Folder or hub id that it was started with."""
    label: str
    """Of its weights."""
    context: int | None
    """Most tokens of prompt and response; None: it does not say."""
    of_a_run: bool = False
    """vLLM with the routes of a run's engines, which need no tokenizer and name their weights."""

    def client(self, vocab: int, deadline_s: float, silent_s: float) -> HttpEngine:
        """A client that accepts the weights that were found, and no others."""
        if self.kind == "sglang":
            return SglangEngine(self.url, deadline_s, silent_s, vocab, own=self.label)
        if self.of_a_run:
            return VllmEngine(self.url, deadline_s, silent_s, own=self.label)
        return CompletionsEngine(self.url, deadline_s, silent_s, self.served, self.label)


def look(url: str, deadline_s: float = 10.0) -> Running:
    """Ask a server what it is.

    Raises:
        EngineGone: nobody answers there.
        EngineError: it is neither a vLLM nor an SGLang server, or wants a token.
    """
    with httpx.Client(base_url=url, timeout=deadline_s, trust_env=False, headers=token_header()) as http:
        try:
            return _sglang(url, http) or _vllm(url, http)
        except httpx.HTTPError as error:
            raise EngineGone(f"{url} cannot be reached: {type(error).__name__} {error}") from None
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{url} answers as neither vLLM nor SGLang does: {error!r}") from None


def is_healthy(url: str) -> bool:
    """Whether a server answers that it is well, within seconds: SGLang takes one, for a token that it makes to be sure."""
    try:
        return _client().get(f"{url}/health", headers=token_header()).status_code == HTTPStatus.OK
    except httpx.HTTPError:
        return False


@cache
def _client() -> httpx.Client:
    """For questions that are asked every moment: making one takes 30 ms. Servers close idle connections, so it keeps none."""
    return httpx.Client(timeout=3.0, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def _sglang(url: str, http: httpx.Client) -> Running | None:
    info = _get(http, "/model_info")
    if info is None:
        return None
    given = (_get(http, "/server_info") or {}).get("context_length")
    context = given and given - SPARE
    name = info.get("served_model_name") or info["model_path"]
    return Running(url, "sglang", name, info["model_path"], str(info["weight_version"]), context)


def _vllm(url: str, http: httpx.Client) -> Running:
    models = _get(http, "/v1/models")
    if models is None:
        raise EngineError(f"{url} has neither /v1/models nor /model_info: it is neither a vLLM nor an SGLang server")
    model = models["data"][0]
    weights = _get(http, CompletionsEngine.version_route)
    label = UNLABELLED if weights is None else str(weights["weight_version"])
    of_a_run = weights is not None and http.get(VllmEngine.generate_route).status_code == HTTPStatus.METHOD_NOT_ALLOWED
    return Running(url, "vllm", model["id"], model.get("root") or model["id"], label, model.get("max_model_len"), of_a_run)


def _get(http: httpx.Client, route: str) -> Any:
    """The answer; None: there is no such route."""
    answer = http.get(route)
    if answer.status_code == HTTPStatus.NOT_FOUND:
        return None
    if answer.status_code != HTTPStatus.OK:
        hint = " (set HPT_TOKEN)" if answer.status_code == HTTPStatus.UNAUTHORIZED else ""
        raise EngineError(f"{http.base_url} refused {route} ({answer.status_code}){hint}: {answer.text[:200]}")
    return answer.json()
