"""What the processes of a run inherit of the shell's environment: all but what would configure the run behind its back.

torchrun reads every option of its own as PET_…, vLLM its API key and its ports, torch.distributed who is rank 0: a variable
that another program has left in a shell makes a run hang or refuse its own requests. What the run needs, it sets itself.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

logger = logging.getLogger(__name__)

PASS = "HPT_PASS"
"""Variable that names what is passed on all the same: names and patterns (``VLLM_LOGGING_LEVEL,NCCL_*``)."""

READERS: Mapping[str, tuple[str, ...]] = {
    "torchrun": ("PET_*", "TORCHELASTIC_*", "TORCH_ELASTIC_*", "LOGLEVEL", "PYTHON_EXEC"),
    "torch.distributed": (
        *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
        *("TORCH_NCCL_*", "TORCH_GLOO_*", "TORCH_UCC_*", "TORCH_DISTRIBUTED_*", "TORCH_FR_*", "TORCH_SYMMMEM*"),
    ),
    "Megatron and Transformer Engine": ("MEGATRON_*", "MCORE_*", "NVTE_*"),
    "vLLM": ("VLLM_*",),
    "SGLang": (
        "SGLANG_*",
        "SGL_*",
        "SYNC_TOKEN_IDS_ACROSS_TP",
        "DISABLE_OPENAPI_DOC",
        "REQUEST_TIMEOUT",
        "HOST_IP",
        "LOCAL_SIZE",
    ),
    "NCCL": ("NCCL_*",),
    "torch's numbers": ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCHDYNAMO_DISABLE", "TRITON_INTERPRET"),
    "other servers and launchers": ("WEB_CONCURRENCY", "UVICORN_*", "RAY_*", "LMCACHE_*", "GLOO_DEVICE_TRANSPORT", "USE_LIBUV"),
    "Python": ("PYTHONOPTIMIZE", "PYTHONINSPECT"),
}
"""Who reads them → variables, as patterns of the shell."""

HARDWARE = (
    *("NCCL_SOCKET_*", "NCCL_IB_*", "NCCL_NET", "NCCL_NET_*", "NCCL_NETDEVS_POLICY", "NCCL_CROSS_NIC", "NCCL_OOB_NET_*"),
    *("NCCL_TOPO_FILE", "NCCL_P2P_*", "NCCL_PXN_*", "NCCL_SHM_DISABLE", "NCCL_MNNVL_*", "NCCL_NVLS_ENABLE", "NCCL_GDRCOPY_*"),
    *("NCCL_COLLNET_ENABLE", "NCCL_TUNER_PLUGIN", "NCCL_IGNORE_CPU_AFFINITY", "NCCL_DEBUG", "NCCL_DEBUG_*"),
)
"""Passed on: what describes the network and the links of a machine, which only its site knows, and what NCCL logs."""


_TORCHS = ("torchrun", "torch.distributed")
_cleared: set[str] = set()


def clear() -> None:
    """Take what torch reads when it is imported out of this process's environment: a LOGLEVEL of another program ends that."""
    read = [pattern for reader in _TORCHS for pattern in READERS[reader]]
    for name in withheld(os.environ):
        if _matches(name, read):
            _cleared.add(name)
            del os.environ[name]


def inherited(shell: Mapping[str, str], *named: str) -> dict[str, str]:
    """The part of an environment that a run's processes get, before what the run sets itself.

    Args:
        named: variables that the configuration names, and that go with it.
    """
    left_out = set(withheld(shell)) - set(named)
    return {name: value for name, value in shell.items() if name not in left_out}


def withheld(shell: Mapping[str, str]) -> list[str]:
    """Names of the other part, sorted."""
    passed = (*HARDWARE, *filter(None, re.split(r"[\s,]+", shell.get(PASS, ""))))
    read = [pattern for patterns in READERS.values() for pattern in patterns]
    return sorted(name for name in shell if _matches(name, read) and not _matches(name, passed))


def say_what_is_withheld() -> None:
    """Of this process's environment, when a run starts."""
    if names := sorted({*withheld(os.environ), *_cleared}):
        logger.warning(
            "note: not passed on to the run's processes: %s; where one is meant to be: %s=%s", ", ".join(names), PASS, names[0]
        )


def inherited_here(*named: str) -> dict[str, str]:
    """`inherited` of this process's own environment."""
    return inherited(os.environ, *named)


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
