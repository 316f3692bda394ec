"""The share of this machine that a server without a GPU gets: its cores, and room for its KV cache."""

from __future__ import annotations

import os

from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape


def threads_of_one_rank() -> str:
    """Return the number of threads of a one-rank engine: all cores but one, which vLLM leaves to the server's other work
    (utils/ompmultiprocessing.py)."""
    return str(max(1, len(os.sched_getaffinity(0)) - 1))


def cores_of_ranks(ranks: int) -> str:
    """Share the cores of this process out among ranks, written as vLLM and SGLang read it: ``0,1,2|3,4,5``.

    Where there are more ranks than cores, several ranks get the same core.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    shares = [cores[rank * each % len(cores) :][:each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def cache_room(config: Config, shape: ModelShape) -> int:
    """Return how many tokens' keys and values fit into `rollout.kv_cache_gib` of one rank."""
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    heads = max(1, shape.kv_heads // config.rollout.tensor_parallel)  # ranks beyond the heads share them
    return config.rollout.kv_cache_gib * 2**30 // (2 * shape.layers * heads * shape.head_dim * element)
