"""A Qwen3 of a few hundred thousand parameters with random weights, dense or a mixture of experts, beside `tiny_llama`."""

from __future__ import annotations

from pathlib import Path

from megatron_hpt.data.files import whole_folder
from megatron_hpt.examples.tiny_llama import tokenizer


def write(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    head_dim: int = 16,
    experts: int = 0,
    norm_topk_prob: bool = True,
    tied: bool = False,
    positions: int = 64,
    seed: int = 0,
) -> None:
    """Write a Hugging Face folder, whole: configuration, random weights, tokenizer with a chat template.

    Args:
        experts: experts of a layer, two of them for each token; 0: a dense model.
        norm_topk_prob: of a mixture of experts.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    words = tokenizer()
    common = {
        "vocab_size": len(words),
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    sparse = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if experts:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **sparse, norm_topk_prob=norm_topk_prob))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**common))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # at the usual 1, a norm that is missing or misplaced would hardly show
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)
