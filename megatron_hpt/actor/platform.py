"""Where the actor runs: CUDA when there is one, else the host presented as an accelerator."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Platform:
    """Device, collective backend, and what Megatron-Core needs to accept them."""

    device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """A real accelerator."""
        return self.device.type == "cuda"

    @property
    def has_transformer_engine(self) -> bool:
        """Layers are Transformer Engine's: a real accelerator with the package installed."""
        return self.is_cuda and importlib.util.find_spec("transformer_engine") is not None

    def building(self) -> contextlib.AbstractContextManager:
        """Hold while building, stepping or loading Megatron objects."""
        if self.is_cuda:
            return contextlib.nullcontext()
        from megatron_hpt.actor import host

        return host.as_accelerator()


def detect(threads: int) -> Platform:
    """The platform of this process; installs the host facade where there is no CUDA.

    Args:
        threads: torch threads of a host rank.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        # gloo as well: Python objects (manifests, metrics) travel between hosts, not devices.
        return Platform(torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl")
    from megatron_hpt.actor import host

    torch.set_num_threads(threads)
    host.install()
    return Platform(torch.device("cpu"), "gloo")
