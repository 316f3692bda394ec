"""Build the Megatron GPT model of a Hugging Face folder, load its weights, and name its shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_hpt.actor import checkpoint
from megatron_hpt.actor.model import fp8_weights, kernels, rope
from megatron_hpt.actor.model.attention import PackedAttention
from megatron_hpt.actor.model.norm import RMSNorm
from megatron_hpt.actor.model.precision import FP8_RECIPES, prove_fp8, this_machine
from megatron_hpt.actor.parallel import Ranks
from megatron_hpt.actor.platform import Platform
from megatron_hpt.config import ActorConfig, Config, ParallelConfig
from megatron_hpt.models.checkpoints import is_checkpoint
from megatron_hpt.models.hf_config import ModelShape, run_shape
from megatron_hpt.models.hf_files import HfTensors
from megatron_hpt.models.mapping import Place, ShardView, shard_views


class PolicyModel(GPTModel):
    """A GPT model whose last stage returns hidden states; `logprob` makes log-probabilities of them without all logits."""

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [local vocabulary, hidden]; on the last stage only."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


def _recompute(actor: ActorConfig) -> dict[str, Any]:
    return {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": list(actor.recompute_modules)},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[actor.recompute]


def kernels_of_run(shape: ModelShape, config: Config, platform: Platform) -> dict[str, bool]:
    """Return which of Megatron's kernels and overlaps this run uses (`kernels.choose`).

    Raises:
        ConfigError: `actor.kernels` asks for one that cannot run here.
    """
    return kernels.choose(_situation(shape, config, platform), config.actor.kernels)


def _situation(shape: ModelShape, config: Config, platform: Platform) -> kernels.Situation:
    engine = this_machine().engine if uses_transformer_engine(platform, getattr(torch, config.model.dtype)) else None
    return kernels.Situation.of(config, shape, platform.is_cuda, engine)


_OF_MODEL = (
    *("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"),
    *("moe_grouped_gemm", "moe_permute_fusion", "overlap_p2p_comm", "batch_p2p_comm"),
)
"""Kernels that Megatron builds the model with; the others are of its gradients (`optimizer.wrap`)."""


def transformer_config(shape: ModelShape, config: Config, platform: Platform) -> TransformerConfig:
    """Return Megatron's configuration of the model.

    Raises:
        ConfigError: `actor.kernels` or `actor.expert_dispatcher` asks for what cannot run here.
    """
    dtype, parallel = getattr(torch, config.model.dtype), config.parallel
    used = kernels_of_run(shape, config, platform)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        qk_layernorm=shape.qk_norm,  # also adds up the gradients of q/k norms over tensor ranks, whose heads differ
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=not platform.is_cuda,
        # Every weight is loaded afterwards, but without initialisation Megatron does not mark its parameters as tensor
        # parallel, and the gradient norm would count only rank 0's shards.
        perform_initialization=True,
        # Packed micro-batches differ in length. An interleaved schedule of two stages would confuse the shapes of the two
        # directions (both go to the same rank), so there all micro-batches of a step are padded to one length.
        variable_seq_lengths=parallel.virtual_pipeline == 1,
        deterministic_mode=config.actor.deterministic,
        calculate_per_token_loss=True,  # the loss is already divided by its global denominators
        persist_layer_norm=False,
        masked_softmax_fusion=False,  # of Megatron's own attention, which is not used
        gradient_accumulation_fusion=False,  # set when there are gradient buffers (`optimizer.wrap`)
        **{flag: used[flag] for flag in _OF_MODEL},
        **_recompute(config.actor),
        **_fp8(config.actor),
        **kernels.dispatcher(_situation(shape, config, platform), config.actor.expert_dispatcher),
        **(_experts(shape, parallel) if shape.experts else {}),
    )


def _fp8(actor: ActorConfig) -> dict[str, Any]:
    if actor.fp8 == "none":
        return {}
    return {
        "fp8": FP8_RECIPES[actor.fp8].format,
        "fp8_recipe": actor.fp8,
        "fp8_param": actor.fp8_param_gather,
        "first_last_layers_bf16": actor.bf16_layers > 0,
        "num_layers_at_start_in_bf16": actor.bf16_layers,
        "num_layers_at_end_in_bf16": actor.bf16_layers,
    }


def _experts(shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.ffn,
        # The softmax over the chosen experts alone is that over all experts divided by its sum over the chosen.
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        # No auxiliary loss: it would pull the policy away from what the objective asks for.
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_ranks,
    }


def build(shape: ModelShape, config: TransformerConfig, ranks: Ranks, platform: Platform) -> list[PolicyModel]:
    """Build this rank's chunks of the model, with random weights; there is more than one under virtual pipelining."""
    pieces = config.virtual_pipeline_model_parallel_size or 1
    return [_build_chunk(shape, config, ranks, platform, piece if pieces > 1 else None) for piece in range(pieces)]


def _build_chunk(
    shape: ModelShape, config: TransformerConfig, ranks: Ranks, platform: Platform, piece: int | None
) -> PolicyModel:
    with platform.building():
        model = PolicyModel(
            config,
            _block(shape, config, get_num_layers_to_build(config, vp_stage=piece), platform),
            vocab_size=padded_vocabulary(shape.vocab, ranks.tensor.size),
            max_sequence_length=shape.max_positions,
            pre_process=ranks.pipeline == 0 and not piece,
            post_process=ranks.is_last_stage and piece in (None, (config.virtual_pipeline_model_parallel_size or 1) - 1),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            vp_stage=piece,
        )
        rope.place(model, shape)
    return model.to(platform.device)


def uses_transformer_engine(platform: Platform, dtype: torch.dtype) -> bool:
    """Return whether layers are Transformer Engine's, whose fused attention computes in half precision only."""
    return platform.has_transformer_engine and dtype is not torch.float32


def _block(shape: ModelShape, config: TransformerConfig, layers: int, platform: Platform) -> TransformerBlockSubmodules:
    """Choose the layers: Transformer Engine's where they can be, else Megatron's with our own attention and norm."""
    grouped = config.moe_grouped_gemm
    kind = {"num_experts": shape.experts or None, "moe_grouped_gemm": grouped, "qk_layernorm": shape.qk_norm}
    if uses_transformer_engine(platform, config.params_dtype):
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(**kind)
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    layer = get_gpt_layer_local_spec(**kind, normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if shape.experts:
        # Checkpoints have Transformer Engine's names, in which the norm before a router is a module of its own.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def load(folder: str, config: Config, ranks: Ranks, platform: Platform) -> list[PolicyModel]:
    """Build this rank's chunks of a model in the run's layout, with the weights of a Hugging Face folder or a checkpoint.

    Raises:
        ConfigError: FP8 is asked for, and the model does not compute in it.
        ModelError: the folder's weights cannot be read, or are not those of the model.
        CheckpointError: the checkpoint is damaged, or is not of the model.
    """
    shape = run_shape(config, folder)
    chunks = build(shape, transformer_config(shape, config, platform), ranks, platform)
    prove_fp8(config.actor.fp8, _fp8_layers(chunks, shape.layers, config.actor.bf16_layers))
    if is_checkpoint(folder):
        checkpoint.load(Path(folder), chunks, None, platform)
    else:
        load_hf(chunks, shape, ranks, folder)
    return chunks


def _fp8_layers(chunks: Sequence[PolicyModel], layers: int, bf16_layers: int) -> list[torch.nn.Module]:
    """Return this rank's layers but those of the first and last of the whole model that compute in bfloat16."""
    held = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return [layer for layer in held if bf16_layers < layer.layer_number <= layers - bf16_layers]  # numbers begin with 1


def padded_vocabulary(vocab: int, tensor: int) -> int:
    """Return the rows of the embedding: the vocabulary, and as many more as make it divisible by the tensor parallel ranks."""
    return -(-vocab // tensor) * tensor


_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12])\.weight(\d+)$")


def global_parameters(chunks: Sequence[PolicyModel], shape: ModelShape, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's parameters under names with the numbers that layer and expert have in the whole model."""
    first_expert = ranks.expert.rank * (shape.experts // ranks.expert.size)
    for chunk in chunks:
        layers = get_transformer_layer_offset(chunk.config, vp_stage=chunk.vp_stage)
        for name, parameter in chunk.named_parameters():
            # A grouped product has the weights of all its experts in one module, numbered.
            name = _GROUPED.sub(r"\1.local_experts.\3.\2.weight", name)
            name = _shifted(name, "decoder.layers.", layers)
            yield _shifted(name, ".local_experts.", first_expert), parameter


def _shifted(name: str, before: str, by: int) -> str:
    """Return the name with `by` added to the number that follows `before`, if it has one."""
    head, separator, tail = name.partition(before)
    if not separator:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}{before}{int(number) + by}.{rest}"


def _is_expert(parameter: Tensor) -> bool:
    """Return whether a parameter is an expert's, which has parallel ranks of its own; Megatron marks it so."""
    return not getattr(parameter, "allreduce", True)


def _place(parameter: Tensor, ranks: Ranks) -> Place:
    """Return which shard of a parameter this rank holds."""
    return ranks.expert_tensor if _is_expert(parameter) else ranks.tensor


def views(
    chunks: Sequence[PolicyModel],
    shape: ModelShape,
    ranks: Ranks,
    *,
    contributing: bool = False,
    of: Callable[[Tensor], Tensor] = Tensor.detach,
) -> list[ShardView]:
    """Return views of this rank's parameters as boxes of Hugging Face tensors.

    Args:
        contributing: return only the boxes that this rank contributes to an export; each box of the model comes from one rank.
        of: what of a parameter is viewed: itself, or a tensor of its shape (its gradient).
    """
    views_of_all = []
    for name, parameter in global_parameters(chunks, shape, ranks):
        is_expert, place = _is_expert(parameter), _place(parameter, ranks)
        held = shard_views(name, of(parameter), shape, place)
        if contributing:
            # The first of the ranks that hold the same shard contributes it, and the first tensor parallel rank what all copy.
            is_first = ranks.expert_data == 0 if is_expert else ranks.data == 0 and ranks.context.rank == 0
            held = [view for view in held if is_first and (place.rank == 0 or not view.copied)]
        views_of_all += held
    return views_of_all


def contributed_views(
    chunks: Sequence[PolicyModel], shape: ModelShape, ranks: Ranks, of: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[ShardView]:
    """Return the boxes that this rank contributes to an export (`views`)."""
    return views(chunks, shape, ranks, contributing=True, of=of)


@torch.no_grad()
def load_hf(chunks: Sequence[PolicyModel], shape: ModelShape, ranks: Ranks, folder: str | Path) -> None:
    """Fill this rank's parameters from the folder's safetensors; every parameter is written completely.

    Raises:
        ModelError: the folder has no safetensors, or a file is damaged, or a tensor is missing or has another shape.
    """
    files = HfTensors(folder)
    files.check(shape)
    for name, parameter in global_parameters(chunks, shape, ranks):
        values = fp8_weights.writable(parameter)  # zeros: rows that only pad the vocabulary stay so
        for view in shard_views(name, values, shape, _place(parameter, ranks), loading=True):
            view.write(files.get(view.name))
        fp8_weights.fill(parameter, values)
