"""What the coordinator asks of a rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingRequest:
    """n samples of one prompt."""

    tokens: list[int]
    samples: int
    seed: int
    """The engine derives a seed for each sample from it."""
    temperature: float
    top_p: float
    max_tokens: int
    stop_token: int


@dataclass(frozen=True)
class Sample:
    """One response as token ids; never re-tokenised."""

    tokens: list[int]
    logprobs: list[float]
    """log-probability of each token under the distribution it was sampled from."""
    finish_reason: str
    """``stop`` (end-of-sequence was sampled) or ``length``."""
    version: int
    """Version of the weights that sampled every one of its tokens."""


class Engine(Protocol):
    """A server that samples."""

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample; raises EngineError when the engine fails or answers what it must not."""

    async def close(self) -> None:
        """Close connections."""
