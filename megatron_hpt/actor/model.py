"""Building the Megatron GPT model of a Hugging Face folder, loading its weights, naming its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_hpt.actor.attention import PackedAttention
from megatron_hpt.actor.parallel import Ranks
from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import Config, ModelConfig, ParallelConfig
from megatron_hpt.weights.hf_config import ModelShape, model_shape
from megatron_hpt.weights.hf_files import HfTensors
from megatron_hpt.weights.mapping import ShardView, shard_views


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, platform: Platform
) -> TransformerConfig:
    """Megatron's configuration of the model; fusions that need CUDA extensions are off."""
    dtype = getattr(torch, model.dtype)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not platform.is_cuda,
        # Every weight is loaded afterwards, but without initialisation Megatron does not mark its parameters as tensor
        # parallel, and the gradient norm would count only rank 0's shards.
        perform_initialization=True,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, even in a dense model
        batch_p2p_comm=False,
        calculate_per_token_loss=True,  # the loss is already divided by its global denominators
        persist_layer_norm=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build(shape: ModelShape, config: TransformerConfig, ranks: Ranks, platform: Platform) -> GPTModel:
    """This rank's part of the model, with weights not yet loaded."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    with platform.building():
        model = GPTModel(
            config,
            spec,
            vocab_size=padded_vocabulary(shape.vocab, ranks.tensor.size),
            max_sequence_length=shape.max_positions,
            pre_process=ranks.pipeline == 0,
            post_process=ranks.is_last_stage,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
        )
    return model.to(platform.device)


def load(folder: str, config: Config, ranks: Ranks, platform: Platform) -> GPTModel:
    """This rank's part of the model in a Hugging Face folder, in the run's layout."""
    shape = model_shape(folder)
    settings = transformer_config(shape, config.model, config.parallel, platform)
    gpt = build(shape, settings, ranks, platform)
    load_hf(gpt, shape, ranks, folder)
    return gpt


def padded_vocabulary(vocab: int, tensor: int) -> int:
    """Rows of the embedding so that it divides by the tensor parallel ranks."""
    return -(-vocab // tensor) * tensor


def global_parameters(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters under names with the global layer number."""
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, layer, rest = name.split(".", 3)
            name = f"decoder.layers.{int(layer) + offset}.{rest}"
        yield name, parameter


def views(
    model: GPTModel,
    shape: ModelShape,
    ranks: Ranks,
    *,
    loading: bool = False,
    of: Callable[[Tensor], Tensor] = Tensor.detach,
) -> list[ShardView]:
    """Every Hugging Face box that this rank's parameters hold.

    Args:
        of: what of a parameter is looked at: itself, or a tensor of its shape (its gradient).
    """
    return [
        view
        for name, parameter in global_parameters(model)
        for view in shard_views(name, of(parameter), shape, ranks.tensor, loading=loading)
    ]


def contributed_views(
    model: GPTModel, shape: ModelShape, ranks: Ranks, of: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[ShardView]:
    """The boxes that this rank contributes to an export: each box of the model is contributed exactly once."""
    if ranks.data > 0:
        return []
    mine = views(model, shape, ranks, of=of)
    return [view for view in mine if ranks.tensor.rank == 0 or view.extent != view.shape]


@torch.no_grad()
def load_hf(model: GPTModel, shape: ModelShape, ranks: Ranks, folder: str | Path) -> None:
    """Fill this rank's parameters from the folder's safetensors; every parameter is written completely.

    Raises:
        ModelError: no safetensors, a damaged file, a missing tensor or one of another shape.
    """
    files = HfTensors(folder)
    files.check(shape)
    for parameter in model.parameters():
        parameter.zero_()  # rows that only pad the vocabulary
    for view in views(model, shape, ranks, loading=True):
        view.write(files.get(view.name))
