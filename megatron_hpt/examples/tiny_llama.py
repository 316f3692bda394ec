"""A Llama of a few million parameters with random weights and a tokenizer of numbers and single characters."""

from __future__ import annotations

from pathlib import Path

from megatron_hpt.files import whole_folder

_TOKENS = [*map(str, range(100)), *"+-*/=()., \n"]
"""Numbers below 100 are one token each: the model learns sums, not carries."""
_SPECIAL = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "\\boxed{": 3, "}": 4}
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def write(
    folder: Path,
    *,
    hidden: int = 384,
    layers: int = 2,
    heads: int = 12,
    kv_heads: int = 6,
    head_dim: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
    positions: int = 64,
    tied: bool = False,
    seed: int = 0,
) -> None:
    """Write a Hugging Face folder, whole: configuration, random weights, tokenizer with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=vocab or len(words),
        hidden_size=hidden,
        intermediate_size=ffn or hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        words.save_pretrained(temporary)


def tokenizer():
    """The tokenizer of these models: a fast one, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = dict(_SPECIAL)
    for token in _TOKENS:
        vocabulary[token] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|\d{1,2}|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    words.chat_template = _TEMPLATE
    return words
