"""What is refused of the models that a run names, before it starts."""

from __future__ import annotations

from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.errors import CheckpointError, ConfigError, ModelError
from megatron_hpt.models.checkpoints import damage, is_checkpoint, read_meta
from megatron_hpt.models.hf_config import ModelShape, run_shape
from megatron_hpt.models.hf_files import HfTensors
from megatron_hpt.models.mapping import hf_tensor_shapes


def check_weights(model: str | Path, shape: ModelShape) -> None:
    """Check that a Hugging Face folder or a checkpoint has every tensor of the model with its shape, and no other.

    Raises:
        ModelError, CheckpointError: names the tensors.
    """
    if not is_checkpoint(model):
        return HfTensors(model).check(shape)
    from megatron_hpt.models.megatron_files import ChunkReader  # torch's checkpoints take a second to import

    read_meta(Path(model))
    if reason := damage(Path(model)):
        raise CheckpointError(f"model.path: {model}: {reason}")
    ChunkReader(Path(model), shape)


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
