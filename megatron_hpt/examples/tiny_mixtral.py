"""A mixture of experts of a few hundred thousand parameters with random weights, beside `tiny_llama`."""

from __future__ import annotations

from pathlib import Path

from megatron_hpt.data.files import whole_folder
from megatron_hpt.examples.tiny_llama import tokenizer


def write(folder: Path, *, hidden: int = 64, layers: int = 2, experts: int = 4, positions: int = 64, seed: int = 0) -> None:
    """Write a Hugging Face folder, whole: configuration, random weights, tokenizer with a chat template."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    words = tokenizer()
    config = MixtralConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=positions,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)
