"""Keep states of the actor in host memory while nothing needs them on the device.

Main weights and moments are needed by the optimizer step alone, and weights and gradients are not needed while engines on
the same devices generate. A storage is emptied and filled again in place, so that every view of it stays valid; Megatron
has many.
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
        tensors: the tensors whose storages move; each storage moves once and whole, however many views of it there are.
        keep: keep the contents; without it storages come back with undefined contents, and take no host memory.
    """

    def __init__(self, tensors: Iterable[Tensor], keep: bool = True) -> None:
        by_address = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        self._storages = [storage for storage in by_address.values() if storage.nbytes()]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._keep = keep
        self._host: list[list[Tensor]] = []
        self._away = False

    @property
    def nbytes(self) -> int:
        """Bytes that the storages take on the device while they are there."""
        return sum(self._sizes)

    @torch.no_grad()
    def leave(self) -> None:
        """Empty the storages, having copied their contents to the host if they are kept; idempotent."""
        if self._away:
            return
        if self._keep:
            self._host = self._host or [_host_buffer(storage) for storage in self._storages]
            for resting, of_storage in self._pieces():
                resting.copy_(of_storage, non_blocking=True)
            _synchronize(self._storages)  # copies must have ended before their memory is given back
        for storage in self._storages:
            storage.resize_(0)
        self._away = True

    @torch.no_grad()
    def come_back(self) -> None:
        """Allocate the storages again, with their contents if they are kept; idempotent."""
        if not self._away:
            return
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        for resting, of_storage in self._pieces():
            of_storage.copy_(resting, non_blocking=True)
        self._away = False

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each piece of host memory with the bytes of a storage that rest in it; none if contents are not kept."""
        for host, storage in zip(self._host, self._storages, strict=self._keep):
            yield from zip(host, _bytes(storage).split([len(piece) for piece in host]), strict=True)


class Offload:
    """What rests in host memory and when, by the setting `actor.offload`.

    Args:
        kind: "none" keeps all on the device; under "optimizer" main weights and moments rest between optimizer steps; under
            "all" weights and gradients rest too, between `sleep` and `wake`.
        reference: the frozen reference policy's chunks, which rest as the weights do.
        shared: engines use the same device between `sleep` and `wake`, so that `sleep` frees the allocator's cache too,
            whatever rests.
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
        # A float32 parameter is its own main weight, which must stay for the forward pass.
        states = [t for t in _states(optimizer) if t.untyped_storage().data_ptr() not in of_model]
        self._optimizer = Resting(states if kind != "none" else ())
        self._model = [Resting(weights), Resting((b.grad_data for b in buffers), keep=False)] if kind == "all" else []
        self._shared = shared or bool(self._model)
        self._optimizer.leave()

    @contextlib.contextmanager
    def optimizer(self) -> Iterator[None]:
        """Hold while main weights and moments are used: to step, to save or to load."""
        self._optimizer.come_back()
        try:
            yield
        finally:
            self._optimizer.leave()

    def sleep(self) -> int:
        """Give the device memory to others until `wake`; called between steps only, since gradients are lost.

        Returns:
            Bytes of weights and gradients that were freed.
        """
        for part in self._model:
            part.leave()
        if self._shared and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sum(part.nbytes for part in self._model)

    def wake(self) -> None:
        """Bring weights back, and allocate gradients again; idempotent."""
        for part in self._model:
            part.come_back()


def _states(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield main weights and moments."""
    for part in optimizer.chained_optimizers:
        for parameter in part.model_param_gbuf_map:
            yield from (t for t in part._get_main_param_and_optimizer_states(parameter).values() if isinstance(t, Tensor))


def pinned_sizes(nbytes: int) -> list[int]:
    """Return the sizes in which so many bytes of pinned memory are allocated, largest first.

    Torch rounds every pinned allocation up to a power of two (aten/src/ATen/core/CachingHostAllocator.h), which makes 2.2 GB of
    1.1 GB. So each piece is one, and only the last, of less than a MiB, is rounded up.
    """
    sizes = []
    while nbytes >= _LAST_PIECE:
        sizes.append(1 << (nbytes.bit_length() - 1))
        nbytes -= sizes[-1]
    return [*sizes, nbytes] if nbytes else sizes


_LAST_PIECE = 1 << 20


def _host_buffer(storage: torch.UntypedStorage) -> list[Tensor]:
    on_gpu = storage.device.type == "cuda"
    sizes = pinned_sizes(storage.nbytes()) if on_gpu else [storage.nbytes()]
    return [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for size in sizes]


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """View a storage as a uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(storages: Sequence[torch.UntypedStorage]) -> None:
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.synchronize()
