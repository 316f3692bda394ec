"""What a server without a GPU gets of this machine: threads, and room for its KV cache."""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.cores import WAITING, assigned
from megatron_hpt.models.hf_config import ModelShape


def threads_of_ranks(config: Config) -> dict[str, str]:
    """Return the environment variables from which every rank of a server takes its threads when it imports torch."""
    return {"OMP_NUM_THREADS": str(assigned(config).engines.threads), **WAITING}


def cores_of_ranks(config: Config) -> str:
    """Return the cores of the ranks of one server, written as SGLang reads them: ``0,1,2|3,4,5``."""
    ranks = assigned(config).engines.ranks[: config.rollout.tensor_parallel]
    return "|".join(",".join(map(str, cores)) for cores in ranks)


def cache_room(config: Config, shape: ModelShape) -> int:
    """Return how many tokens' keys and values fit into `rollout.kv_cache_gib` of one rank."""
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    heads = max(1, shape.kv_heads // config.rollout.tensor_parallel)  # ranks beyond the heads share them
    return config.rollout.kv_cache_gib * 2**30 // (2 * shape.layers * heads * shape.head_dim * element)
