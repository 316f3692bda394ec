"""A tiny random model of every family and of what families differ in, for tests and demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hpt.examples.tiny_llama import tokenizer
from megatron_hpt.files import whole_folder

POSITIONS = 64
_SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # of 8192, which tiny sequences would not notice
}


def write(folder: Path, model_type: str, *, seed: int = 0, **config: Any) -> None:
    """Write a Hugging Face folder, whole: configuration, random weights, tokenizer with a chat template.

    Args:
        model_type: as in config.json.
        config: keys of config.json in place of the usual ones; a head_dim of None: hidden_size shared by the heads.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer()
    usual = {
        "vocab_size": len(words) // 2 * 2 + 1,  # odd, so that tensor parallel ranks pad it
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": POSITIONS,
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    keys = {**usual, **config}
    keys = {key: value for key, value in keys.items() if (key, value) != ("head_dim", None)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # at the usual 1 and 0, norms and biases that are missing or misplaced would hardly show
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)
            elif "layers" in name:
                torch.nn.init.normal_(parameter, std=0.1)  # attention that is not flat
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)


MODELS: dict[str, Callable[[Path], None]] = {
    "llama": partial(write, model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}),
    "llama, tied": partial(write, model_type="llama", tie_word_embeddings=True, num_key_value_heads=4),
    "llama 3": partial(write, model_type="llama", rope_parameters=LLAMA_3),
    "llama, positions interpolated": partial(
        write, model_type="llama", rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    ),
    "mistral": partial(write, model_type="mistral", sliding_window=POSITIONS, head_dim=16),
    "qwen2": partial(write, model_type="qwen2", head_dim=None),
    "qwen2, tied": partial(write, model_type="qwen2", head_dim=None, tie_word_embeddings=True),
    "qwen3": partial(write, model_type="qwen3"),
    "qwen3, tied": partial(write, model_type="qwen3", tie_word_embeddings=True),
    "mixtral": partial(write, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": partial(write, model_type="qwen3_moe", num_experts=4, norm_topk_prob=True, **_SPARSE),
    "qwen3_moe, probabilities over all experts": partial(
        write, model_type="qwen3_moe", num_experts=4, norm_topk_prob=False, **_SPARSE
    ),
}
"""Name → writer of a folder."""
