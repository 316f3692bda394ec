"""Hugging Face ↔ Megatron tensors as two-way rules: one table per family, one line per Megatron parameter.

A rule says which Hugging Face tensors a parameter is made of. Applied to the parameter as it lies on one tensor parallel
rank it gives *views*, each with the box of the Hugging Face tensor that it holds: reading a view exports a shard, writing
it loads one. So loading, conversion, the final export and the weight transfer share the same line, and no tensor has to
be gathered to be named. Applied to a model's shape alone it gives names, shapes and cuts. Imports no torch.

Parameters have the names that they have in a checkpoint, which are those with Transformer Engine's layers; `LOCAL_NAMES`
has the two that differ without them. The layout facts (megatron-core 0.16.1, transformers 5.19; checked by
log-probabilities and gradients in tests/actor): ``linear_qkv`` interleaves by query group,
``[group, (q…q, k, v), head_dim]``; ``linear_fc1`` stacks gate over up on every rank.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hpt.errors import ModelError
from megatron_hpt.models.hf_config import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

Sizes = tuple[int, ...]
Dims = tuple[str, ...]
"""Names of a tensor's dimensions; `dimensions` has their sizes."""
Indices = tuple[int, ...]
"""The numbers in a parameter's name: layer, and expert where there is one."""


def dimensions(shape: ModelShape) -> dict[str, int]:
    """Return the sizes of the dimensions that the tables name."""
    return {
        "vocab": shape.vocab,
        "hidden": shape.hidden,
        "query": shape.heads * shape.head_dim,
        "key": shape.kv_heads * shape.head_dim,
        "head": shape.head_dim,
        "ffn": shape.ffn,
        "experts": shape.experts,
    }


def _sizes(dims: Dims, shape: ModelShape) -> Sizes:
    known = dimensions(shape)
    return tuple(known[dim] for dim in dims)


@dataclass(frozen=True)
class ShardView:
    """A view of a local Megatron parameter and the box of the HF tensor it corresponds to."""

    name: str
    """Hugging Face name."""
    shape: Sizes
    """Shape of the whole HF tensor."""
    offset: Sizes
    """Where the box starts in each dimension."""
    extent: Sizes
    """Size of the box in each dimension."""
    view: Tensor
    """View of the local parameter; `extent` after a reshape."""
    copied: bool = False
    """Whether every tensor parallel rank has this box."""

    def read(self) -> Tensor:
        """Return the box as a tensor of shape `extent`; it is a copy only where the layouts differ."""
        return self.view.reshape(self.extent)

    def write(self, whole: Tensor) -> None:
        """Copy this box out of the whole HF tensor into the local parameter."""
        box = whole
        for dim, (start, size) in enumerate(zip(self.offset, self.extent, strict=True)):
            box = box.narrow(dim, start, size)
        self.write_box(box)

    def write_box(self, box: Tensor) -> None:
        """Copy the box itself, of shape `extent`, into the local parameter."""
        self.view.copy_(box.reshape(self.view.shape))


@dataclass(frozen=True)
class Place:
    """The shard of a parameter that a rank holds."""

    rank: int = 0
    """Tensor parallel rank."""
    size: int = 1
    """Number of tensor parallel ranks."""


class Rule(ABC):
    """What one Megatron parameter is in Hugging Face's terms."""

    cut: int | None
    """The dimension that tensor parallel ranks share; None: every rank has all of it."""
    how: str
    """How the parameter is made of Hugging Face tensors, in words."""

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Rules of the tensors that are stacked in a shard, in the same order as in the whole parameter."""
        return (self,)

    @abstractmethod
    def tensors(self, shape: ModelShape) -> dict[str, Sizes]:
        """Return the shape of each Hugging Face tensor by its name pattern."""

    @abstractmethod
    def sizes(self, shape: ModelShape, ranks: int = 1) -> Sizes:
        """Return the shape of the parameter over all tensor parallel ranks, as Megatron has it."""

    @abstractmethod
    def views(self, local: Tensor, shape: ModelShape, place: Place, indices: Indices) -> Iterator[ShardView]:
        """Yield views of a rank's shard, one for each box of a Hugging Face tensor.

        Args:
            local: the shard, on any device, also meta.
            indices: numbers that fill the name patterns.
        """

    def shard_sizes(self, shape: ModelShape, ranks: int) -> Sizes:
        """Return the shape of one rank's shard.

        Raises:
            ModelError: the ranks do not divide the parameter.
        """
        sizes = self.sizes(shape, ranks)
        if self.cut is None:
            return sizes
        if sizes[self.cut] % ranks:
            raise ModelError(f"{ranks} tensor parallel ranks do not divide {', '.join(self.tensors(shape))}: {sizes}")
        return tuple(n // ranks if d == self.cut else n for d, n in enumerate(sizes))


@dataclass(frozen=True)
class Same(Rule):
    """One Hugging Face tensor."""

    hf: str
    dims: Dims
    cut: int | None = None
    padded: bool = False
    """Whether Megatron pads the cut dimension to a multiple of the ranks; Hugging Face has no padding."""

    @property
    def how(self) -> str:
        if self.cut is None:
            return "on every rank"
        return f"{('rows', 'columns')[self.cut]} cut{', padded to divide' if self.padded else ''}"

    def tensors(self, shape: ModelShape) -> dict[str, Sizes]:
        return {self.hf: _sizes(self.dims, shape)}

    def sizes(self, shape: ModelShape, ranks: int = 1) -> Sizes:
        real = _sizes(self.dims, shape)
        return tuple(-(-n // ranks) * ranks if self.padded and d == self.cut else n for d, n in enumerate(real))

    def views(self, local: Tensor, shape: ModelShape, place: Place, indices: Indices) -> Iterator[ShardView]:
        name, whole = self.hf.format(*indices), _sizes(self.dims, shape)
        if self.cut is None:
            yield ShardView(name, whole, (0,) * len(whole), whole, local, copied=place.size > 1)
            return
        start = place.rank * local.shape[self.cut]
        count = max(0, min(local.shape[self.cut], whole[self.cut] - start))
        if count:
            offset = tuple(start if d == self.cut else 0 for d in range(len(whole)))
            extent = tuple(count if d == self.cut else n for d, n in enumerate(whole))
            yield ShardView(name, whole, offset, extent, local.narrow(self.cut, 0, count))


class Stacked(Rule):
    """Tensors of equal shape, cut along their rows and stacked in every rank's shard (gate over up)."""

    cut, how = 0, "rows cut, stacked on every rank"

    def __init__(self, *hf: str, dims: Dims) -> None:
        self._parts = tuple(Same(name, dims, cut=0) for name in hf)

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self._parts

    def tensors(self, shape: ModelShape) -> dict[str, Sizes]:
        return {name: size for part in self._parts for name, size in part.tensors(shape).items()}

    def sizes(self, shape: ModelShape, ranks: int = 1) -> Sizes:
        rows, *rest = self._parts[0].sizes(shape, ranks)
        return (rows * len(self._parts), *rest)

    def views(self, local: Tensor, shape: ModelShape, place: Place, indices: Indices) -> Iterator[ShardView]:
        for part, rows in zip(self._parts, local.chunk(len(self._parts)), strict=True):
            yield from part.views(rows, shape, place, indices)


@dataclass(frozen=True)
class GroupedQkv(Rule):
    """Query, key and value rows, interleaved by query group.

    A cut of the rows keeps whole groups, unless there are more ranks than groups: then it goes through them, and Megatron
    gathers a group's activations (megatron/core/transformer/attention.py, `get_query_key_value_tensors`).
    """

    q: str
    k: str
    v: str
    dims: Dims
    """Dimensions after the rows."""
    cut, how = 0, "query groups cut"

    def tensors(self, shape: ModelShape) -> dict[str, Sizes]:
        rest, known = _sizes(self.dims, shape), dimensions(shape)
        return {self.q: (known["query"], *rest), self.k: (known["key"], *rest), self.v: (known["key"], *rest)}

    def sizes(self, shape: ModelShape, ranks: int = 1) -> Sizes:
        return ((shape.heads + 2 * shape.kv_heads) * shape.head_dim, *_sizes(self.dims, shape))

    def views(self, local: Tensor, shape: ModelShape, place: Place, indices: Indices) -> Iterator[ShardView]:
        rows = local.shape[0]
        a_group = (shape.heads_per_group + 2) * shape.head_dim
        cuts = _whole_groups if rows % a_group == 0 else _rows_of_groups
        for name, whole in self.tensors(shape).items():
            rest = whole[1:]
            for start, count, view in cuts(name, self, local, shape, place.rank * rows):
                yield ShardView(name.format(*indices), whole, (start, *(0 for _ in rest)), (count, *rest), view)


Cut = tuple[int, int, "Tensor"]
"""First row in the Hugging Face tensor, rows, view of the shard."""


def _whole_groups(name: str, rule: GroupedQkv, local: Tensor, shape: ModelShape, first: int) -> Iterator[Cut]:
    """Yield one strided view over all groups of a shard that holds whole ones."""
    queries = shape.heads_per_group
    groups = local.view(-1, queries + 2, shape.head_dim, *local.shape[1:])
    start, heads = {rule.q: (0, queries), rule.k: (queries, 1), rule.v: (queries + 1, 1)}[name]
    a_group = heads * shape.head_dim
    yield first // ((queries + 2) * shape.head_dim) * a_group, groups.shape[0] * a_group, groups.narrow(1, start, heads)


def _rows_of_groups(name: str, rule: GroupedQkv, local: Tensor, shape: ModelShape, first: int) -> Iterator[Cut]:
    which = (rule.q, rule.k, rule.v).index(name)
    for start, offset, count in qkv_rows(shape, which, first, local.shape[0]):
        yield start, count, local.narrow(0, offset, count)


def qkv_rows(shape: ModelShape, which: int, first: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield where rows of the query (which = 0), key (1) or value (2) lie in a range of the interleaved rows.

    Yields:
        First row in the Hugging Face tensor, first row in the range, rows.
    """
    head = shape.head_dim
    queries = shape.heads_per_group * head
    begin, size = ((0, queries), (queries, head), (queries + head, head))[which]
    for group in range(shape.kv_heads):
        at = group * (queries + 2 * head) + begin
        low, high = max(at, first), min(at + size, first + rows)
        if low < high:
            yield group * size + low - at, low - first, high - low


_LAYER = "model.layers.{}."
_ATTENTION = "decoder.layers.{}.self_attention."
Table = dict[str, Rule]
"""Megatron name, numbers as {} → rule; in the order of the model."""

QKV_BIAS: Table = {_ATTENTION + "linear_qkv.bias": GroupedQkv(*(f"{_LAYER}self_attn.{x}_proj.bias" for x in "qkv"), dims=())}
QK_NORM: Table = {_ATTENTION + f"{x}_layernorm.weight": Same(f"{_LAYER}self_attn.{x}_norm.weight", ("head",)) for x in "qk"}
DENSE: Table = {
    "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight": Same(_LAYER + "post_attention_layernorm.weight", ("hidden",)),
    "decoder.layers.{}.mlp.linear_fc1.weight": Stacked(
        _LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight", dims=("ffn", "hidden")
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": Same(_LAYER + "mlp.down_proj.weight", ("hidden", "ffn"), cut=1),
}


def experts(block: str, gate: str, up: str, down: str) -> Table:
    """Return the lines of a mixture of experts; families name the block and an expert's three matrices differently."""
    gate, up, down = (f"{_LAYER}{block}.experts.{{}}.{x}.weight" for x in (gate, up, down))
    expert = "decoder.layers.{}.mlp.experts.local_experts.{}."
    return {
        "decoder.layers.{}.pre_mlp_layernorm.weight": Same(_LAYER + "post_attention_layernorm.weight", ("hidden",)),
        "decoder.layers.{}.mlp.router.weight": Same(f"{_LAYER}{block}.gate.weight", ("experts", "hidden")),
        expert + "linear_fc1.weight": Stacked(gate, up, dims=("ffn", "hidden")),
        expert + "linear_fc2.weight": Same(down, ("hidden", "ffn"), cut=1),
    }


def decoder(*more: Table, feed_forward: Table = DENSE) -> Table:
    """Return the table of a Llama-like decoder.

    Args:
        more: lines of the attention beyond Llama's.
    """
    qkv = GroupedQkv(*(f"{_LAYER}self_attn.{x}_proj.weight" for x in "qkv"), dims=("hidden",))
    return {
        "embedding.word_embeddings.weight": Same("model.embed_tokens.weight", ("vocab", "hidden"), cut=0, padded=True),
        _ATTENTION + "linear_qkv.layer_norm_weight": Same(_LAYER + "input_layernorm.weight", ("hidden",)),
        _ATTENTION + "linear_qkv.weight": qkv,
        **{name: rule for table in more for name, rule in table.items()},
        _ATTENTION + "linear_proj.weight": Same(_LAYER + "self_attn.o_proj.weight", ("hidden", "query"), cut=1),
        **feed_forward,
        "decoder.final_layernorm.weight": Same("model.norm.weight", ("hidden",)),
        "output_layer.weight": Same("lm_head.weight", ("vocab", "hidden"), cut=0, padded=True),
    }


FAMILIES: dict[str, Table] = {
    "llama": decoder(),
    "mistral": decoder(),
    "qwen2": decoder(QKV_BIAS),
    "qwen3": decoder(QK_NORM),
    "mixtral": decoder(feed_forward=experts("block_sparse_moe", "w1", "w3", "w2")),
    "qwen3_moe": decoder(QK_NORM, feed_forward=experts("mlp", "gate_proj", "up_proj", "down_proj")),
}
"""model_type → rules. Another family is another line here and in `hf_config`."""

LOCAL_NAMES = {
    "decoder.layers.{}.input_layernorm.weight": _ATTENTION + "linear_qkv.layer_norm_weight",
    "decoder.layers.{}.pre_mlp_layernorm.weight": "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight",
}
"""Without Transformer Engine norms are modules of their own; before experts they always are."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def shard_views(name: str, local: Tensor, shape: ModelShape, place: Place, *, loading: bool = False) -> list[ShardView]:
    """Return the views of one local parameter.

    Args:
        name: Megatron name with the *global* numbers of layer and expert, e.g. ``decoder.layers.3.mlp.linear_fc1.weight``.
        local: the parameter as it lies on this rank (any device, also meta).
        loading: include the tied output layer, which is read from the embedding but not written back.

    Raises:
        ModelError: the family has no rule for this parameter.
    """
    rules = FAMILIES[shape.family]
    indices, pattern = tuple(map(int, _NUMBER.findall(name))), _NUMBER.sub("{}", name)
    if pattern == "output_layer.weight" and shape.tied_embeddings:
        # The last pipeline stage keeps a copy of the embedding.
        return list(rules["embedding.word_embeddings.weight"].views(local, shape, place, indices)) if loading else []
    rule = rules.get(pattern) or rules.get(LOCAL_NAMES.get(pattern, pattern))
    if rule is None:
        raise ModelError(f"no rule of family {shape.family!r} maps the Megatron parameter {name!r}")
    return list(rule.views(local, shape, place, indices))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a model."""

    pattern: str
    indices: Indices
    rule: Rule

    @property
    def name(self) -> str:
        """Megatron's name, with the global numbers of layer and expert."""
        return self.pattern.format(*self.indices)

    def tensors(self, shape: ModelShape) -> dict[str, Sizes]:
        """Return the shape of each Hugging Face tensor that it is made of, by name."""
        return {name.format(*self.indices): sizes for name, sizes in self.rule.tensors(shape).items()}


def parameters(shape: ModelShape) -> Iterator[Parameter]:
    """Yield every parameter of a model that has values of its own, in the model's order."""
    lines = [x for x in FAMILIES[shape.family].items() if not (x[0] == "output_layer.weight" and shape.tied_embeddings)]
    for layered, group in itertools.groupby(lines, lambda line: "{}" in line[0]):
        group = list(group)
        for layer in range(shape.layers) if layered else [None]:
            for pattern, rule in group:
                for indices in _indices(pattern.count("{}"), layer, shape.experts):
                    yield Parameter(pattern, indices, rule)


def _indices(count: int, layer: int | None, experts: int) -> list[Indices]:
    if layer is None:
        return [()]
    return [(layer,)] if count == 1 else [(layer, expert) for expert in range(experts)]


def hf_tensor_shapes(shape: ModelShape) -> dict[str, Sizes]:
    """Return name and shape of every tensor of the HF model, all of which a complete transfer or folder must hold."""
    return {name: sizes for parameter in parameters(shape) for name, sizes in parameter.tensors(shape).items()}
