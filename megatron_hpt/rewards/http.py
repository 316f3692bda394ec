"""A reward model behind vLLM's or SGLang's server."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_hpt.config import HttpRewardConfig, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards.grades import Answer, Cause, Grade, graded, ungraded


@dataclass(frozen=True)
class Server:
    """How an engine's server is asked for scores. Both have /classify, each with a form of its own."""

    body: Callable[[list[str], HttpRewardConfig], dict[str, Any]]
    outputs: Callable[[Any], list[list[float]]]
    """Takes the server's answer; returns the model's outputs for each text, in order."""


SERVERS = {
    # vllm/entrypoints/pooling/classify/protocol.py: ClassificationCompletionRequest, ClassificationResponse
    "vllm": Server(
        lambda texts, settings: {"input": texts, "use_activation": settings.activation},
        lambda answer: [row["probs"] for row in sorted(answer["data"], key=lambda row: row["index"])],
    ),
    # sglang/srt/entrypoints/http_server.py: classify_request; a score is a vector like an embedding
    "sglang": Server(lambda texts, settings: {"text": texts}, lambda answer: [row["embedding"] for row in answer]),
}


class RewardServer:
    """Asks the server for scores, some answers at a time. Texts are prompt and response, as the policy saw and wrote them."""

    def __init__(self, settings: RewardConfig) -> None:
        """
        Raises:
            ConfigError: `reward.http.key_variable` is not set in the environment.
        """
        self._headers = _key_header(settings.http.key_variable)
        self._settings, self._server = settings.http, SERVERS[settings.http.engine]
        self._url, self._deadline_s = settings.http.url.rstrip("/") + "/classify", settings.deadline_s

    async def grade(self, answers: Sequence[Answer]) -> list[Grade]:
        """Return grades in order. Never raises for an answer: a request that fails or is late leaves its answers ungraded."""
        size, gate = self._settings.batch, asyncio.Semaphore(self._settings.requests)
        async with aiohttp.ClientSession(headers=self._headers) as session:

            async def one(part: Sequence[Answer]) -> list[Grade]:
                async with gate:
                    return await self._ask(session, part)

            parts = [answers[start : start + size] for start in range(0, len(answers), size)]
            return [grade for grades in await asyncio.gather(*map(one, parts)) for grade in grades]

    async def _ask(self, session: aiohttp.ClientSession, answers: Sequence[Answer]) -> list[Grade]:
        body = self._server.body([answer.prompt + answer.response for answer in answers], self._settings)
        try:
            async with asyncio.timeout(self._deadline_s), session.post(self._url, json=body) as response:
                if response.status != 200:
                    raise ValueError(f"{response.status} {(await response.text())[:300]}")
                scores = [float(row[self._settings.label]) for row in self._server.outputs(await response.json())]
            if len(scores) != len(answers) or not all(map(math.isfinite, scores)):
                raise ValueError(f"{len(scores)} scores for {len(answers)} answers, or one that is not a number: {scores}")
        except TimeoutError:
            return [ungraded(Cause.DEADLINE, f"{self._url}: no answer in {self._deadline_s:g} s")] * len(answers)
        except (aiohttp.ClientError, LookupError, TypeError, ValueError) as error:
            return [ungraded(Cause.ERROR, f"{self._url}: {type(error).__name__}: {error}")] * len(answers)
        return [graded(self._verdict(score)) for score in scores]

    def _verdict(self, score: float) -> float:
        threshold = self._settings.threshold
        return score if threshold is None else float(score >= threshold)


def _key_header(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"reward.http.key_variable: given {variable!r}, which is not set in the environment")
    return {"Authorization": f"Bearer {key}"}
