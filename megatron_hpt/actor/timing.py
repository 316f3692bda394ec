"""Measure what the objective itself costs in a step: the time between log-probabilities and their gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class ObjectiveTimer:
    """Adds up the host's seconds in the loss's forward and backward over micro-batches; on CUDA those of launching kernels."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started = 0.0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure the computation of a loss, which is the body of the ``with``."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def watch_backward(self, loss: Tensor, inputs: Sequence[Tensor]) -> None:
        """Measure the loss's backward pass: from the arrival of a gradient at the loss to the last gradient of its inputs."""
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        if not loss.requires_grad:
            return
        loss.register_hook(self._start)
        for tensor in inputs:
            tensor.register_hook(self._lap)

    def collect(self, device: torch.device) -> float:
        """Return the seconds since the last call, those of the slowest rank; collective."""
        seconds = torch.tensor(self._seconds, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self._seconds = 0.0
        return seconds.item()

    def _start(self, _: Tensor) -> None:
        self._started = time.perf_counter()

    def _lap(self, _: Tensor) -> None:
        now = time.perf_counter()
        self._seconds += now - self._started
        self._started = now
