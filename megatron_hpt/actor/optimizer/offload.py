"""States of the actor that rest in host memory while nothing needs them on the device.

Main weights and moments are needed by the optimizer step alone; weights and gradients are not needed while engines on
the same devices generate. A storage is emptied and filled again in place, so every view of it, and Megatron has many,
stays valid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class Resting:
    """Storages whose bytes can be moved to the host and back.

    Args:
        tensors: of any kind; each storage is moved once, whole.
        keep: their contents; without it they come back with any contents, and cost no host memory.
    """

    def __init__(self, tensors: Iterable[Tensor], keep: bool = True) -> None:
        found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._storages = [storage for storage in found.values() if storage.nbytes()]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._keep = keep
        self._host: list[Tensor] = []
        self._away = False

    @property
    def nbytes(self) -> int:
        """Bytes on the device when they are there."""
        return sum(self._sizes)

    @torch.no_grad()
    def leave(self) -> None:
        """Empty the storages; twice is once."""
        if self._away:
            return
        if self._keep:
            self._host = self._host or [_host_buffer(storage) for storage in self._storages]
            for host, storage in zip(self._host, self._storages, strict=True):
                host.copy_(_bytes(storage), non_blocking=True)
            _synchronize(self._storages)
        for storage in self._storages:
            storage.resize_(0)
        self._away = True

    @torch.no_grad()
    def come_back(self) -> None:
        """Fill the storages again; twice is once."""
        if not self._away:
            return
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        for host, storage in zip(self._host, self._storages, strict=self._keep):
            _bytes(storage).copy_(host, non_blocking=True)
        self._away = False


class Offload:
    """What rests when, by `actor.offload`.

    Args:
        kind: "none"; "optimizer": main weights and moments between optimizer steps; "all": also weights and gradients
            between `sleep` and `wake`.
        reference: the frozen reference policy's chunks.
        shared: others want the device between `sleep` and `wake`, whatever rests: the allocator's cache is theirs too.
    """

    def __init__(
        self,
        kind: Literal["none", "optimizer", "all"],
        wrapped: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        reference: Sequence[torch.nn.Module] = (),
        shared: bool = False,
    ) -> None:
        buffers = [b for chunk in wrapped for b in chunk.buffers + chunk.expert_parallel_buffers]
        frozen = [parameter for chunk in reference for parameter in chunk.parameters()]
        weights = [*(buffer.param_data for buffer in buffers), *frozen]
        of_model = {weight.untyped_storage().data_ptr() for weight in weights}
        # A float32 parameter is its own main weight.
        states = [t for t in _states(optimizer) if t.untyped_storage().data_ptr() not in of_model]
        self._optimizer = Resting(states if kind != "none" else ())
        self._model = [Resting(weights), Resting((b.grad_data for b in buffers), keep=False)] if kind == "all" else []
        self._shared = shared or bool(self._model)
        self._optimizer.leave()

    @contextlib.contextmanager
    def optimizer(self) -> Iterator[None]:
        """Main weights and moments are there inside: to step, to save, to load."""
        self._optimizer.come_back()
        try:
            yield
        finally:
            self._optimizer.leave()

    def sleep(self) -> int:
        """Give the device memory to others until `wake`; only between steps, since gradients are forgotten.

        Returns:
            Bytes given.
        """
        for part in self._model:
            part.leave()
        if self._shared and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sum(part.nbytes for part in self._model)

    def wake(self) -> None:
        """Take it back."""
        for part in self._model:
            part.come_back()


def _states(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            yield from (t for t in part._get_main_param_and_optimizer_states(parameter).values() if isinstance(t, Tensor))


def _host_buffer(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(storages: Sequence[torch.UntypedStorage]) -> None:
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.synchronize()
