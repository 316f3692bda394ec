"""What is refused of the models that a run names, before it starts."""

from __future__ import annotations

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError, ModelError
from megatron_hpt.models.hf_config import ModelShape, run_shape
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.models.megatron_files import check_weights


def check_reference_model(config: Config, shape: ModelShape) -> None:
    """Refuse a reference model of the KL whose sizes are not the actor's or whose weights are not whole; its constants may be
    others.

    Raises:
        ConfigError, ModelError: names the key and what differs.
    """
    path = config.algorithm.kl.reference
    if not config.algorithm.kl.coefficient or path is None:
        return
    reference = run_shape(config, path)
    if (reference.heads, hf_tensor_shapes(reference)) != (shape.heads, hf_tensor_shapes(shape)):
        raise ConfigError(f"algorithm.kl.reference: the model in {path} has other sizes than that in {config.model.path}")
    if reference.max_positions < config.max_sequence_length:
        raise ConfigError(
            f"algorithm.kl.reference: the model in {path} has {reference.max_positions} positions; prompt and response have "
            f"{config.max_sequence_length} (data.max_prompt_length + data.max_response_length)"
        )
    check_weights(path, shape)


def check_vocabulary(config: Config, tokens: int, shape: ModelShape) -> None:
    """Refuse a tokenizer that has more tokens than the model has rows for.

    Args:
        tokens: of the tokenizer.

    Raises:
        ModelError: it has.
    """
    if tokens > shape.vocab:
        raise ModelError(f"model.path: the tokenizer has {tokens} tokens, the model in {config.model.path} only {shape.vocab}")
