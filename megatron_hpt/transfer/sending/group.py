"""The trainer's ranks, which succeed or fail together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_hpt.errors import HptError, TransferError

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


class TrainerGroup:
    """All trainer ranks, on a backend that moves Python objects on the host. All methods but `attempt` are collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.is_first = self.rank == 0

    def gather(self, mine: Any) -> list:
        """Return what each rank gave, in their order."""
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def collectively(self, action: Callable[[], Value]) -> Value:
        """Run an action on every rank, and return what it returned on this one.

        Raises:
            HptError: on every rank, what the lowest rank that failed met.
        """
        values: list[Value] = []
        for error in self.gather(self.attempt(lambda: values.append(action()))):
            if error is not None:
                raise error
        return values[0]

    def attempt(self, action: Callable[[], None]) -> HptError | None:
        """Run an action and return the error that it met, which other ranks have to learn of."""
        try:
            action()
        except HptError as error:
            return error
        except Exception as error:  # told to all ranks, which would else wait for this one
            logger.exception("weight transfer")
            return TransferError(f"rank {self.rank}: {type(error).__name__}: {error}")
        return None
