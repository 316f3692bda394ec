"""Hugging Face ↔ Megatron tensors as two-way rules on shards.

A rule looks at one Megatron parameter as it lies on one tensor parallel rank and returns *views* of it, each with the
box of the Hugging Face tensor that it holds. Reading the view exports a shard, writing it loads one, so loading,
conversion, the final export and the weight transfer share the same line, and no tensor has to be gathered to be named.

The layout facts (megatron-core 0.16.1, transformers 5.19; checked by log-probabilities and gradients in
tests/actor/test_actor.py): ``linear_qkv`` interleaves by query group, ``[group, (q…q, k, v), head_dim]``;
``linear_fc1`` stacks gate over up on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_hpt.errors import ModelError
from megatron_hpt.weights.hf_config import ModelShape


@dataclass(frozen=True)
class ShardView:
    """A view of a local Megatron parameter and the box of the HF tensor it corresponds to."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Shape of the whole HF tensor."""
    offset: tuple[int, ...]
    """Where the box starts in each dimension."""
    extent: tuple[int, ...]
    """Size of the box in each dimension."""
    view: Tensor
    """View of the local parameter; `extent` after a reshape."""

    def read(self) -> Tensor:
        """The box as a tensor of shape `extent` (a copy only where the layouts differ)."""
        return self.view.reshape(self.extent)

    def write(self, whole: Tensor) -> None:
        """Copy this box out of the whole HF tensor into the local parameter."""
        box = whole
        for dim, (start, size) in enumerate(zip(self.offset, self.extent, strict=True)):
            box = box.narrow(dim, start, size)
        self.view.copy_(box.reshape(self.view.shape))


@dataclass(frozen=True)
class Place:
    """Which shard of a parameter a rank holds."""

    rank: int = 0
    """Tensor parallel rank."""
    size: int = 1
    """Tensor parallel ranks."""


Rule = Callable[[Tensor, ModelShape, Place, tuple[str, ...]], Iterator[ShardView]]
"""From a parameter, the model, the shard and the numbers in the parameter's name (layer, expert) to its views."""


def _box(name: str, shape: tuple[int, ...], start: int, view: Tensor, extent: tuple[int, ...], dim: int = 0) -> ShardView:
    offset = tuple(start if d == dim else 0 for d in range(len(shape)))
    return ShardView(name, shape, offset, extent, view)


def replicated(hf: str) -> Rule:
    """The same tensor on every tensor parallel rank (norms)."""

    def rule(local: Tensor, shape: ModelShape, place: Place, indices: tuple[str, ...]) -> Iterator[ShardView]:
        yield _box(hf.format(*indices), tuple(local.shape), 0, local, tuple(local.shape))

    return rule


def split(hf: str, dim: int) -> Rule:
    """One HF tensor cut along `dim` over the tensor parallel ranks."""

    def rule(local: Tensor, shape: ModelShape, place: Place, indices: tuple[str, ...]) -> Iterator[ShardView]:
        whole = tuple(n * place.size if d == dim else n for d, n in enumerate(local.shape))
        yield _box(hf.format(*indices), whole, place.rank * local.shape[dim], local, tuple(local.shape), dim)

    return rule


def vocabulary(hf: str) -> Rule:
    """Rows of the vocabulary; Megatron pads it to divide by the ranks, Hugging Face has only the real rows."""

    def rule(local: Tensor, shape: ModelShape, place: Place, indices: tuple[str, ...]) -> Iterator[ShardView]:
        start = place.rank * local.shape[0]
        rows = max(0, min(local.shape[0], shape.vocab - start))
        if rows:
            yield _box(hf, (shape.vocab, local.shape[1]), start, local[:rows], (rows, local.shape[1]))

    return rule


def stacked(*hf: str) -> Rule:
    """Several HF tensors of equal shape stacked on dim 0 of every rank's shard (gate over up)."""

    def rule(local: Tensor, shape: ModelShape, place: Place, indices: tuple[str, ...]) -> Iterator[ShardView]:
        for name, part in zip(hf, local.chunk(len(hf)), strict=True):
            whole = (part.shape[0] * place.size, *part.shape[1:])
            yield _box(name.format(*indices), whole, place.rank * part.shape[0], part, tuple(part.shape))

    return rule


def grouped_qkv(q: str, k: str, v: str) -> Rule:
    """Query, key and value rows interleaved by query group, so that a cut of dim 0 keeps whole groups."""

    def rule(local: Tensor, shape: ModelShape, place: Place, indices: tuple[str, ...]) -> Iterator[ShardView]:
        queries, width = shape.heads_per_group, local.shape[1:]
        groups = local.view(-1, queries + 2, shape.head_dim, *width)
        for name, start, count in ((q, 0, queries), (k, queries, 1), (v, queries + 1, 1)):
            view = groups.narrow(1, start, count)
            rows = groups.shape[0] * count * shape.head_dim
            yield _box(name.format(*indices), (rows * place.size, *width), place.rank * rows, view, (rows, *width))

    return rule


LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": replicated("model.norm.weight"),
    "output_layer.weight": vocabulary("lm_head.weight"),
    "decoder.layers.{}.input_layernorm.weight": replicated("model.layers.{}.input_layernorm.weight"),
    "decoder.layers.{}.self_attention.linear_qkv.weight": grouped_qkv(
        *(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv")
    ),
    "decoder.layers.{}.self_attention.linear_proj.weight": split("model.layers.{}.self_attn.o_proj.weight", dim=1),
    "decoder.layers.{}.pre_mlp_layernorm.weight": replicated("model.layers.{}.post_attention_layernorm.weight"),
    "decoder.layers.{}.mlp.linear_fc1.weight": stacked(
        "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": split("model.layers.{}.mlp.down_proj.weight", dim=1),
    # Transformer Engine fuses the norms into the linear layer that follows; same tensors, other names.
    "decoder.layers.{}.self_attention.linear_qkv.layer_norm_weight": replicated("model.layers.{}.input_layernorm.weight"),
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": replicated("model.layers.{}.post_attention_layernorm.weight"),
}
# Tied embeddings: the last pipeline stage keeps a copy that is loaded from, but never exported as, the embedding.
TIED_OUTPUT = vocabulary("model.embed_tokens.weight")

QK_NORM: dict[str, Rule] = {
    f"decoder.layers.{{}}.self_attention.{x}_layernorm.weight": replicated(f"model.layers.{{}}.self_attn.{x}_norm.weight")
    for x in "qk"
}


@dataclass(frozen=True)
class ExpertNames:
    """A family's names of a layer's experts."""

    block: str
    gate: str
    up: str
    down: str


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
}


def _sparse(dense: dict[str, Rule], names: ExpertNames) -> dict[str, Rule]:
    """The rules of a dense family with experts in place of the feed-forward network."""
    block = f"model.layers.{{}}.{names.block}"
    gate, up, down = (f"{block}.experts.{{}}.{x}.weight" for x in (names.gate, names.up, names.down))
    return {
        **{name: rule for name, rule in dense.items() if ".mlp.linear_" not in name},
        "decoder.layers.{}.mlp.router.weight": replicated(f"{block}.gate.weight"),
        "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc1.weight": stacked(gate, up),
        "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc2.weight": split(down, dim=1),
    }


QWEN3 = LLAMA | QK_NORM
FAMILIES: dict[str, dict[str, Rule]] = {
    "llama": LLAMA,
    "mixtral": _sparse(LLAMA, EXPERT_NAMES["mixtral"]),
    "qwen3": QWEN3,
    "qwen3_moe": _sparse(QWEN3, EXPERT_NAMES["qwen3_moe"]),
}

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def shard_views(name: str, local: Tensor, shape: ModelShape, place: Place, *, loading: bool = False) -> list[ShardView]:
    """Views of one local parameter.

    Args:
        name: Megatron name with the *global* numbers of layer and expert, e.g. ``decoder.layers.3.mlp.linear_fc1.weight``.
        local: the parameter as it lies on this rank (any device, also meta).
        loading: include the tied output layer, which is read from the embedding but not written back.

    Raises:
        ModelError: the family has no rule for this parameter.
    """
    rules = FAMILIES[shape.family]
    indices, pattern = tuple(_NUMBER.findall(name)), _NUMBER.sub("{}", name)
    if pattern == "output_layer.weight" and shape.tied_embeddings:
        return list(TIED_OUTPUT(local, shape, place, indices)) if loading else []
    if pattern not in rules:
        raise ModelError(f"no rule of family {shape.family!r} maps the Megatron parameter {name!r}")
    return list(rules[pattern](local, shape, place, indices))


def hf_tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the HF model: what a complete transfer or folder must hold."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {"model.embed_tokens.weight": (shape.vocab, shape.hidden), "model.norm.weight": (shape.hidden,)}
    if not shape.tied_embeddings:
        tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": (shape.hidden,),
            f"{layer}.post_attention_layernorm.weight": (shape.hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, shape.hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, shape.hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, shape.hidden),
            f"{layer}.self_attn.o_proj.weight": (shape.hidden, q),
        }
        if shape.qk_norm:
            tensors |= {f"{layer}.self_attn.{x}_norm.weight": (shape.head_dim,) for x in "qk"}
        tensors |= _experts(layer, shape) if shape.experts else _dense(layer, shape)
    return tensors


def _dense(layer: str, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.mlp.gate_proj.weight": (shape.ffn, shape.hidden),
        f"{layer}.mlp.up_proj.weight": (shape.ffn, shape.hidden),
        f"{layer}.mlp.down_proj.weight": (shape.hidden, shape.ffn),
    }


def _experts(layer: str, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    names = EXPERT_NAMES[shape.family]
    tensors = {f"{layer}.{names.block}.gate.weight": (shape.experts, shape.hidden)}
    for expert in (f"{layer}.{names.block}.experts.{i}" for i in range(shape.experts)):
        tensors[f"{expert}.{names.gate}.weight"] = tensors[f"{expert}.{names.up}.weight"] = (shape.ffn, shape.hidden)
        tensors[f"{expert}.{names.down}.weight"] = (shape.hidden, shape.ffn)
    return tensors
