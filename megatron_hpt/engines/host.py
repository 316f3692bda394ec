"""What servers without a GPU are given: cores of this machine, and room for keys and values."""

from __future__ import annotations

import os

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape


def threads_of_one_rank() -> str:
    """Threads of an engine of one rank: one core is left to its server, as vLLM leaves it (utils/ompmultiprocessing.py)."""
    return str(max(1, len(os.sched_getaffinity(0)) - 1))


def cores_of_ranks(ranks: int) -> str:
    """The cores of this process shared out, as vLLM and SGLang want it: ``0-3|4-7``. Ranks beyond the cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    shares = [cores[rank * each % len(cores) :][:each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def cache_room(config: Config, shape: ModelShape) -> int:
    """Tokens for which `rollout.kv_cache_gib` has room."""
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    heads = max(1, shape.kv_heads // config.rollout.tensor_parallel)  # of one rank; more ranks than heads share them
    return config.rollout.kv_cache_gib * 2**30 // (2 * shape.layers * heads * shape.head_dim * element)
