"""Where the actor runs: on CUDA where there is a device, else on the host, presented to Megatron-Core as an accelerator."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Platform:
    """Device and collective backend of this process, and what Megatron-Core needs to accept them."""

    device: torch.device
    backend: str
    """As of `torch.distributed.init_process_group`."""

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a real accelerator."""
        return self.device.type == "cuda"

    @property
    def has_transformer_engine(self) -> bool:
        """Whether layers can be Transformer Engine's: there is a real accelerator, and the package is installed."""
        return self.is_cuda and importlib.util.find_spec("transformer_engine") is not None

    def building(self) -> contextlib.AbstractContextManager:
        """Return a context to hold while Megatron objects are built, stepped, saved or loaded (`host.as_accelerator`)."""
        if self.is_cuda:
            return contextlib.nullcontext()
        from megatron_hpt.actor import host

        return host.as_accelerator()


def detect(threads: int, deterministic: bool = False) -> Platform:
    """Return the platform of this process, and prepare it: choose the device, or install the host facade without CUDA.

    Args:
        threads: torch threads of a rank on the host.
        deterministic: use deterministic kernels; the host's are so anyway.
    """
    _complete_router()
    if deterministic:
        os.environ.update(_DETERMINISTIC)
        torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        # gloo as well: Python objects (manifests, metrics) travel between hosts, not devices.
        return Platform(torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl")
    from megatron_hpt.actor import host

    torch.set_num_threads(threads)
    host.install()
    return Platform(torch.device("cpu"), "gloo")


_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # docs.nvidia.com, cuBLAS, "Results reproducibility"; torch refuses without
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's choice of attention kernels
    "NCCL_ALGO": "Ring",  # one order of sums, whatever NCCL measures when it starts
}
"""Variables that are read when libraries make their first handle; set before that. Megatron-LM asks for the same three."""


def _complete_router() -> None:
    """Define a name that megatron-core 0.16.1's router reads although it imports it with Transformer Engine only."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
