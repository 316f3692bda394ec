"""What the coordinator asks of a rollout engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from megatron_hpt.data.order import hashed


class Weights(Enum):
    """What a server starts with. The value is the word of both engines' ``--load-format``."""

    NONE = "dummy"
    """It waits for a trainer's."""
    FOLDER = "auto"
    """Those of its model's folder; they are version `OWN`."""


SEEDS = 2**32
"""Seeds of a server are below it (numpy's); every request has one of its own besides."""
OWN = 0
"""The version of the weights that a server was started with, where a client is told to accept them."""


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


class Sampler(Protocol):
    """What answers requests: one server, or many behind a pool."""

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample.

        Raises:
            EngineError: the engine failed, or answered what it must not.
            DeadlineError: no answer in time.
        """


class Engine(Sampler, Protocol):
    """A server that samples."""

    url: str

    async def health(self) -> None:
        """Ask whether it is well; has a deadline of its own, after which the server is taken to be dead.

        Raises:
            EngineError: it cannot be reached, or says that it is not.
            DeadlineError: no answer in time.
        """

    async def version(self) -> int | None:
        """Version of the weights that it serves; None before its first. Raises as `health` does."""

    async def progress(self) -> Hashable:
        """Something that changes with the tokens it produces; None: it does not tell. Raises as `health` does."""

    async def close(self) -> None:
        """Close connections."""


def seed_of(*parts: object) -> int:
    """A seed for one request, the same in every run: 31 bits, since engines add the sample's index to it."""
    return hashed(*parts) >> 33
