"""How large the checks are: on a GPU, and small on the host where they are only rehearsed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_hpt.files import whole_folder
from megatron_hpt.models.hf_config import model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes


@dataclass(frozen=True)
class Workload:
    """A model, and the rows that it trains in one step."""

    model: dict[str, Any]
    """Its config.json."""
    rows: int
    row_tokens: int
    micro_batch_tokens: int
    steps: int = 4
    """Number of timed steps."""
    algorithm: str = "hpt"
    entropy: float = 0.01
    recompute: Literal["none", "selective", "full"] = "selective"


@dataclass(frozen=True)
class Sizes:
    """One set of sizes."""

    device: torch.device
    copy_elements: int
    matrix: int
    linear: tuple[int, int, int]
    """Tokens, inputs, outputs of one layer."""
    logprob: tuple[int, int, int]
    """Tokens, hidden units, rows of vocabulary."""
    hybrid: Workload
    """Timed; rollouts and demonstrations."""
    supervised: Workload
    """Timed beside a peer's."""
    parity: Workload
    """Its gradient is compared with the host's; rows have up to this many tokens."""
    processes: int
    """Processes that may run side by side where nothing is timed."""
    has_expectations: bool


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _qwen3(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        **_llama(layers, hidden, heads, kv_heads, ffn, vocab, 40960),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": head_dim,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    }


def on_gpu() -> Sizes:
    """Return sizes for a GPU: Llama-3.2-1B's shape on rows of 4096 tokens, 64k a step; Qwen3-0.6B's as prime-rl times it."""
    llama, small = _llama(16, 2048, 32, 8, 8192, 128256, 4096), _llama(4, 512, 8, 4, 1408, 8192, 512)
    qwen3 = _qwen3(28, 1024, 16, 8, 128, 3072, 151936)
    return Sizes(
        device=torch.device("cuda"),
        copy_elements=2**30,
        matrix=8192,
        linear=(4096, 2048, 4096),
        logprob=(16384, 1536, 151936),
        hybrid=Workload(llama, rows=16, row_tokens=4096, micro_batch_tokens=16384),
        supervised=Workload(qwen3, 2, 8192, 8192, steps=16, algorithm="sft", entropy=0.0, recompute="full"),
        parity=Workload(small, rows=6, row_tokens=192, micro_batch_tokens=16384),
        processes=8,
        has_expectations=True,
    )


def on_host() -> Sizes:
    """Return sizes at which the same code runs in seconds on the host; the numbers say nothing."""
    small = _llama(4, 64, 4, 2, 128, 256, 64)  # layers between those that stay in bfloat16 under FP8
    return Sizes(
        device=torch.device("cpu"),
        copy_elements=2**12,
        matrix=64,
        linear=(32, 16, 32),
        logprob=(64, 32, 256),
        hybrid=Workload(small, rows=6, row_tokens=32, micro_batch_tokens=64, steps=1),
        supervised=Workload(_qwen3(2, 64, 4, 2, 32, 128, 256), 2, 32, 32, 1, "sft", 0.0, "full"),
        parity=Workload(small, rows=6, row_tokens=24, micro_batch_tokens=64),
        processes=1,
        has_expectations=False,
    )


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """Make a Hugging Face folder of this configuration with random weights, unless it is there, and return it."""
    if not folder.exists():
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        with whole_folder(folder) as temporary:
            (temporary / "config.json").write_text(json.dumps(config), encoding="utf-8")
            tensors = hf_tensor_shapes(model_shape(temporary))
            save_file({name: _random(shape, generator) for name, shape in tensors.items()}, temporary / "model.safetensors")
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
