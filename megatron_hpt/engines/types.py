"""Requests, samples, and what the coordinator expects of an engine. Imports neither torch nor an engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import msgspec
import numpy as np

from megatron_hpt.arrays import ArrayRecord
from megatron_hpt.data.order import hashed


class Weights(Enum):
    """The weights that a server starts with. Values are those of the option ``--load-format`` of vLLM and of SGLang."""

    NONE = "dummy"
    """The server starts without weights and waits for a trainer's."""
    FOLDER = "auto"
    """The server reads the weights of its model's folder; they are version `OWN`."""


SEEDS = 2**32
"""Seeds that a server is started with are below this (numpy's limit)."""
OWN = 0
"""Version of the weights that a server was started with, where a client is told to accept samples of them."""


@dataclass(frozen=True)
class SamplingRequest:
    """A request for samples of one prompt."""

    tokens: list[int]
    """Token ids of the prompt."""
    samples: int
    """Number of samples."""
    seed: int
    """Seed from which the engine derives one for each sample. With `rollout.seeded` the same request gives the same samples;
    otherwise the engine draws as it likes."""
    temperature: float
    top_p: float
    max_tokens: int
    stop_token: int
    version: int | None = None
    """The weights that the server is known to serve. Keys and values of a prefix that were computed for requests with another
    number are not used again, so none are older than this."""

    @property
    def cache_salt(self) -> dict[str, str]:
        """The field by which vLLM and SGLang keep prefixes of requests apart; none where no version is known."""
        return {} if self.version is None else {"cache_salt": f"version {self.version}"}


@dataclass(frozen=True)
class Versions:
    """The versions of the weights that a batch or an evaluation takes, from the oldest to the newest, both included."""

    oldest: int
    newest: int

    def __contains__(self, version: int | None) -> bool:
        return version is not None and self.oldest <= version <= self.newest

    def __str__(self) -> str:
        return str(self.oldest) if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


class Span(msgspec.Struct, gc=False):
    """Tokens of a response in a row that the same weights sampled, as vLLM and SGLang describe them."""

    version: str
    """Label of the weights."""
    start: int
    """Index of the first token; the span ends where the next one starts, the last one with the response."""


@dataclass(frozen=True, eq=False)
class Sample(ArrayRecord):
    """One response as the token ids that the engine sampled; they are never re-tokenised."""

    tokens: np.ndarray
    """int32: token ids, the end-of-sequence token included where it was sampled; at least one."""
    logprobs: np.ndarray
    """float32: log π of each token under the distribution that it was sampled from, temperature and nucleus applied."""
    finish_reason: str
    """``stop`` where end-of-sequence was sampled, ``length`` where the response reached `SamplingRequest.max_tokens`."""
    spans: tuple[tuple[int, int], ...]
    """Versions of the weights that sampled the tokens, in order, each with the number of tokens that it sampled in a row."""

    def __post_init__(self) -> None:
        self.hold(tokens=np.int32, logprobs=np.float32)

    @property
    def version(self) -> int:
        """The oldest version of the weights that sampled any of the tokens."""
        return min(version for version, _ in self.spans)


class Sampler(Protocol):
    """Whatever answers sampling requests: one server (`Engine`), or many behind an `EnginePool`."""

    async def generate(self, request: SamplingRequest) -> list[Sample]:
        """Sample one prompt. Called many times at once by the coordinator and by evaluations; a call that is cancelled ends its
        request in the server too.

        Returns:
            `request.samples` samples.

        Raises:
            EngineError: the engine failed, or its answer is incomplete or from weights of no version. A pool then sends the
                request to another engine.
            DeadlineError: the answer did not come in time; this ends the step.
        """


class Engine(Sampler, Protocol):
    """The client of one server. A pool asks `health`, `version` and `progress` every few seconds while a step samples."""

    url: str

    async def health(self) -> None:
        """Return if the server is well.

        Raises:
            EngineError: the server cannot be reached or is not well: the pool takes it out of service.
            DeadlineError: the server did not answer within `deadlines.silent_s`: the pool gives it up for dead.
        """

    async def version(self) -> int | None:
        """Return the version of the weights that the server serves, or None before its first. Raises as `health` does."""

    async def progress(self) -> Hashable:
        """Return a value that changes whenever the server has produced tokens, or None if the server has no such value.

        The pool gives up a server that has requests and the same value for `deadlines.silent_s`. Raises as `health` does.
        """

    async def close(self) -> None:
        """Close all connections. Called once, by whoever made the client."""


def seed_of(*parts: object) -> int:
    """Return a seed for one request that is the same in every run; 31 bits, since engines add a sample's index to it."""
    return hashed(*parts) >> 33
