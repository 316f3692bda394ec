"""Which layouts divide a model and each other, and which lengths fit it. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hpt.config import Config, ParallelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape

VOCABULARY_MULTIPLE = 64
"""To which engines round a vocabulary up."""


def check_layout(config: Config, shape: ModelShape) -> None:
    """Refuse layouts of the actor and of the engines that do not divide the model.

    Raises:
        ConfigError: naming the key and the values that would do.
    """
    parallel = config.parallel
    _check_tensor(parallel.tensor, shape)
    _divides("parallel.pipeline", parallel.pipeline, {"layers": shape.layers})
    _divides("parallel.virtual_pipeline", parallel.virtual_pipeline, {"layers a stage": shape.layers // parallel.pipeline})
    _check_engine_tensor(config.rollout.tensor_parallel, shape)
    if shape.experts:
        _divides("parallel.expert", parallel.expert, {"experts": shape.experts})
        _divides("parallel.expert_tensor", parallel.expert_tensor_ranks, {"expert ffn size": shape.ffn})
        if parallel.tensor > 1 and not parallel.sequence:
            raise ConfigError(
                "parallel.sequence: Megatron-Core trains a mixture of experts with tensor parallelism only under sequence "
                "parallelism; set parallel.sequence=true"
            )
    elif parallel.expert > 1 or parallel.expert_tensor is not None:
        raise ConfigError(
            f"parallel.expert: given {parallel.expert}, parallel.expert_tensor {parallel.expert_tensor}; the model in "
            f"{config.model.path} has no experts: leave both out"
        )
    check_ranks(config)


def check_ranks(config: Config) -> None:
    """Refuse layouts that contradict themselves, whatever the model; `check_layout` does so too.

    Raises:
        ConfigError: naming the key and the values that would do.
    """
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline: given {parallel.virtual_pipeline}; pieces are interleaved over stages, so "
            "parallel.pipeline must be above 1"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence: cuts over tensor parallel ranks, so parallel.tensor must be above 1")
    _divides_ranks(parallel, parallel.expert_tensor_ranks)
    _check_sleep(config)


def _check_sleep(config: Config) -> None:
    """Only engines on the trainer's GPUs have somebody to give their memory to."""
    if not config.rollout.sleep:
        return
    if not config.transfer.shares_gpus:
        raise ConfigError(
            f"rollout.sleep: with transfer.transport={config.transfer.transport} engines are not on the trainer's GPUs, and "
            "nobody would use their memory; leave it out, or set transfer.transport=cuda_ipc"
        )
    if config.rollout.urls:
        raise ConfigError("rollout.sleep: servers of your own (rollout.urls) are not put to sleep; leave one of both out")


def _check_engine_tensor(given: int, shape: ModelShape) -> None:
    """vLLM and SGLang share out what the actor does, and the vocabulary, rounded up (layers/vocab_parallel_embedding.py)."""
    sizes = {"attention heads": shape.heads, "expert ffn size" if shape.experts else "ffn size": shape.ffn}
    sizes["vocabulary, rounded up to tokens"] = -(-shape.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    among = [n for n in range(1, shape.heads + 1) if shape.kv_heads % n == 0 or n % shape.kv_heads == 0]
    _divides("rollout.tensor_parallel", given, sizes, among)
    if given not in among:
        allowed = [n for n in among if all(size % n == 0 for size in sizes.values())]
        raise ConfigError(
            f"rollout.tensor_parallel: given {given}, which neither divides the model's {shape.kv_heads} key/value heads nor "
            f"is a multiple of them; allowed: {', '.join(map(str, allowed))}"
        )


def _check_tensor(given: int, shape: ModelShape) -> None:
    """Ranks share the attention heads evenly, and the key/value heads evenly or, if there are more ranks, a head each."""
    sizes = {"attention heads": shape.heads, "query, key and value rows": (shape.heads + 2 * shape.kv_heads) * shape.head_dim}
    sizes |= {} if shape.experts else {"ffn size": shape.ffn}
    shared = [n for n in range(1, max(shape.heads, given) + 1) if shape.kv_heads % n == 0 or n % shape.kv_heads == 0]
    if given not in shared:
        allowed = [n for n in shared if all(size % n == 0 for size in sizes.values())]
        raise ConfigError(
            f"parallel.tensor: given {given}, which neither divides the model's {shape.kv_heads} key/value heads nor is a "
            f"multiple of them; allowed: {', '.join(map(str, allowed))}"
        )
    _divides("parallel.tensor", given, sizes, among=shared)


def _divides(key: str, given: int, sizes: dict[str, int], among: Sequence[int] | None = None) -> None:
    for what, size in sizes.items():
        if size % given:
            allowed = [n for n in among or range(1, size + 1) if all(s % n == 0 for s in sizes.values())]
            raise ConfigError(
                f"{key}: given {given}, which does not divide the model's {size} {what}; "
                f"allowed: {', '.join(map(str, allowed))}"
            )


def _divides_ranks(parallel: ParallelConfig, expert_tensor: int) -> None:
    """Expert ranks are taken from those of one pipeline stage."""
    stage = parallel.tensor * parallel.context * parallel.data
    ranks = f"the {stage} ranks of a stage (tensor × context × data)"
    if stage % expert_tensor:
        allowed = [n for n in range(1, stage + 1) if stage % n == 0]
        raise ConfigError(
            f"parallel.expert_tensor: given {expert_tensor}, which does not divide {ranks}; "
            f"allowed: {', '.join(map(str, allowed))}"
        )
    if stage % (parallel.expert * expert_tensor):
        allowed = [n for n in range(1, stage + 1) if stage % (n * expert_tensor) == 0]
        raise ConfigError(
            f"parallel.expert: given {parallel.expert} × expert_tensor {expert_tensor}, which does not divide {ranks}; allowed "
            f"with this expert_tensor: {', '.join(map(str, allowed))}"
        )


def check_lengths(config: Config, shape: ModelShape) -> None:
    """Prompt and response fit the model's positions.

    Raises:
        ConfigError: they do not.
    """
    if config.max_sequence_length > shape.max_positions:
        raise ConfigError(
            f"data.max_prompt_length + data.max_response_length: given {config.max_sequence_length}; the model has "
            f"{shape.max_positions} positions (max_position_embeddings in {config.model.path}/config.json; of a model that was "
            "trained on more: model.overrides.max_position_embeddings)"
        )
