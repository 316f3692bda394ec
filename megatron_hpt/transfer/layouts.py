"""Who holds which part of which tensor: the actor's ranks and the engines' ranks, from layouts alone. Pure; no torch.

The actor's cuts are Megatron-Core's (megatron/core/parallel_state.py, order tp-cp-ep-dp-pp), the engines' those of vLLM
0.32 and SGLang 0.5.23, which share them but for pipeline stages of unequal length, where they are vLLM's
(vllm/model_executor/layers/linear.py, vocab_parallel_embedding.py, fused_moe/; distributed/utils.py get_pp_indices).
`tests/transfer/test_engines.py` compares both sides with running ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import ConfigError, ModelError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import qkv_rows
from megatron_hpt.transfer.boxes import Box, part, whole

VOCABULARY_MULTIPLE = 64
"""Engines pad the vocabulary to a multiple of it before they cut it (DEFAULT_VOCAB_PADDING_SIZE)."""


class Cut(Enum):
    """How tensor parallel ranks share a tensor."""

    WHOLE = "whole"
    VOCABULARY = "vocabulary"
    KEY_VALUE = "key_value"
    """Rows of key or value heads: copied where there are fewer heads than ranks."""
    ROWS = "rows"
    COLUMNS = "columns"


_CUTS: tuple[tuple[str, Cut], ...] = (
    (r"(model\.embed_tokens|lm_head)\.weight", Cut.VOCABULARY),
    (r".*(norm\.weight|\.weight_scale)", Cut.WHOLE),
    (r".*\.(q_proj|gate_proj|up_proj|w1|w3)\.(weight|bias|weight_scale_inv)", Cut.ROWS),
    (r".*\.(k_proj|v_proj)\.(weight|bias|weight_scale_inv)", Cut.KEY_VALUE),
    (r".*\.(o_proj|down_proj|w2)\.weight(_scale_inv)?", Cut.COLUMNS),
    (r".*\.(mlp|block_sparse_moe)\.gate\.weight", Cut.WHOLE),
)
_QKV = re.compile(r"\.self_attn\.([qkv])_proj\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class TensorKind:
    """What a tensor's name says about it; `layer` and `expert` are None where it belongs to none."""

    cut: Cut
    layer: int | None
    expert: int | None


def kind_of(name: str) -> TensorKind:
    """Read a Hugging Face name.

    Raises:
        ModelError: no rule matches it.
    """
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    for pattern, cut in _CUTS:
        if re.fullmatch(pattern, name):
            return TensorKind(cut, int(layer[1]) if layer else None, int(expert[1]) if expert else None)
    raise ModelError(f"no rule says how tensor parallel ranks share {name!r}")


Held = list[tuple[Box, tuple[int, ...]]]
"""Boxes of one tensor, each with the ranks that hold it."""


def _slabs(tensor: tuple[int, ...], cut: Cut, size: int) -> list[Box]:
    """Return the boxes of `size` ranks, in their order, of a tensor whose sides divide."""
    if cut is Cut.WHOLE:
        return [whole(tensor)] * size
    dim = 1 if cut is Cut.COLUMNS else 0
    width = tensor[dim] // size
    return [part(tensor, dim, rank * width, width) for rank in range(size)]


def _vocabulary(tensor: tuple[int, ...], size: int, multiple: int) -> list[Box | None]:
    """Return each rank's rows of a padded vocabulary; None for a rank that holds padding alone."""
    rows = -(-tensor[0] // multiple) * multiple
    width = -(-rows // size)
    cuts = [(rank * width, min(width, tensor[0] - rank * width)) for rank in range(size)]
    return [part(tensor, 0, start, count) if count > 0 else None for start, count in cuts]


def _gathered(boxes: list[Box | None], ranks: Callable[[int], tuple[int, ...]]) -> Held:
    """Put equal boxes together, each with all ranks that hold it.

    Args:
        ranks: place in `boxes` → the ranks that hold that box.
    """
    held: dict[Box, list[int]] = {}
    for place, box in enumerate(boxes):
        if box is not None:
            held.setdefault(box, []).extend(ranks(place))
    return [(box, tuple(sorted(holders))) for box, holders in held.items()]


def actor_holdings(tensors: dict[str, tuple[int, ...]], shape: ModelShape, layout: ParallelConfig) -> dict[str, Held]:
    """Return which actor ranks hold which boxes of each tensor.

    Args:
        tensors: Hugging Face name → shape (`hf_tensor_shapes`).
    """
    stage = layout.tensor * layout.context * layout.data
    expert_tensor = layout.expert_tensor_ranks
    replicas = layout.context * layout.data
    layers_a_piece = shape.layers // (layout.pipeline * layout.virtual_pipeline)
    cache: dict[tuple, Held] = {}

    def stage_of(layer: int | None, name: str) -> int:
        if layer is not None:
            return layer // layers_a_piece % layout.pipeline
        return 0 if name.startswith("model.embed_tokens") else layout.pipeline - 1

    def held(name: str, tensor: tuple[int, ...]) -> Held:
        kind = kind_of(name)
        first = stage * stage_of(kind.layer, name)
        if layout.tensor > shape.kv_heads and (which := _QKV.search(name)):
            return _through_groups(tensor, "qkv".index(which[1]), first)
        key = (tensor, kind.cut, first, None if kind.expert is None else kind.expert * layout.expert // shape.experts)
        if key not in cache:
            cache[key] = _dense(tensor, kind.cut, first) if kind.expert is None else _expert(tensor, kind.cut, *key[2:])
        return cache[key]

    def _dense(tensor: tuple[int, ...], cut: Cut, first: int) -> Held:
        # Megatron's embedding is padded to a multiple of the tensor parallel ranks only.
        vocabulary = cut is Cut.VOCABULARY
        boxes = _vocabulary(tensor, layout.tensor, 1) if vocabulary else _slabs(tensor, cut, layout.tensor)
        return _gathered(boxes, lambda t: tuple(first + t + layout.tensor * r for r in range(replicas)))

    def _through_groups(tensor: tuple[int, ...], which: int, first: int) -> Held:
        # More ranks than query groups: Megatron cuts the interleaved rows wherever the ranks' shares end.
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim // layout.tensor
        return [
            (part(tensor, 0, start, count), tuple(first + t + layout.tensor * r for r in range(replicas)))
            for t in range(layout.tensor)
            for start, _, count in qkv_rows(shape, which, t * rows, rows)
        ]

    def _expert(tensor: tuple[int, ...], cut: Cut, first: int, owner: int) -> Held:
        width = expert_tensor * layout.expert
        return _gathered(
            _slabs(tensor, cut, expert_tensor),
            lambda t: tuple(first + t + expert_tensor * owner + width * r for r in range(stage // width)),
        )

    return {name: held(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class EngineLayout:
    """The ranks of one engine; its tensor parallel ranks also share the experts."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    """Expert parallel ranks: experts lie whole on them; the rest of the tensor parallel ranks cuts each expert."""

    def __post_init__(self) -> None:
        if self.tensor % self.expert:
            raise ConfigError(
                f"engine layout: expert {self.expert} does not divide tensor {self.tensor}; experts are shared by the tensor "
                "parallel ranks"
            )

    @property
    def ranks(self) -> int:
        """Number of ranks of one engine; rank = tensor rank + tensor · stage."""
        return self.tensor * self.pipeline

    def stages(self, layers: int) -> list[range]:
        """Return the layers of each pipeline stage: what does not divide goes to the stages before the last."""
        sizes = [layers // self.pipeline] * self.pipeline
        for i in range(layers % self.pipeline):
            sizes[-(i + 2)] += 1
        starts = [sum(sizes[:i]) for i in range(self.pipeline)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def engine_holdings(tensors: dict[str, tuple[int, ...]], shape: ModelShape, layout: EngineLayout) -> dict[str, Held]:
    """Return which ranks of one engine hold which boxes of each tensor.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    _check_engine(shape, layout)
    stage_of = {layer: stage for stage, layers in enumerate(layout.stages(shape.layers)) for layer in layers}
    last = layout.pipeline - 1
    cache: dict[tuple, Held] = {}

    def stages(layer: int | None, name: str) -> tuple[int, ...]:
        if layer is not None:
            return (stage_of[layer],)
        if name.startswith("model.embed_tokens"):
            return (0, last) if shape.tied_embeddings and last else (0,)
        return (last,)

    def boxes(tensor: tuple[int, ...], kind: TensorKind) -> list[Box | None]:
        size = layout.tensor
        if kind.cut is Cut.VOCABULARY:
            multiple = VOCABULARY_MULTIPLE if VOCABULARY_MULTIPLE % size == 0 else VOCABULARY_MULTIPLE * size
            return _vocabulary(tensor, size, multiple)
        if kind.cut is Cut.KEY_VALUE and size > shape.kv_heads:
            rows, left = divmod(tensor[0], shape.kv_heads)  # a head's rows, or its scales' where weights are quantised
            if left:
                raise ConfigError(f"engine layout: {tensor[0]} rows do not divide into {shape.kv_heads} key/value heads")
            return [part(tensor, 0, r * shape.kv_heads // size * rows, rows) for r in range(size)]
        if kind.expert is None:
            return _slabs(tensor, kind.cut, size)
        inner = size // layout.expert
        owner = kind.expert * layout.expert // shape.experts
        cut = _slabs(tensor, kind.cut, inner)
        return [cut[r % inner] if r // inner == owner else None for r in range(size)]

    def held(name: str, tensor: tuple[int, ...]) -> Held:
        kind = kind_of(name)
        where = stages(kind.layer, name)
        key = (tensor, kind.cut, where, None if kind.expert is None else kind.expert * layout.expert // shape.experts)
        if key not in cache:
            cache[key] = _gathered(boxes(tensor, kind), lambda t: tuple(t + layout.tensor * s for s in where))
        return cache[key]

    return {name: held(name, tensor) for name, tensor in tensors.items()}


def _check_engine(shape: ModelShape, layout: EngineLayout) -> None:
    tensor = layout.tensor
    rules = {
        f"{shape.heads} attention heads": shape.heads % tensor == 0,
        f"{shape.kv_heads} key/value heads": shape.kv_heads % tensor == 0 or tensor % shape.kv_heads == 0,
        f"ffn size {shape.ffn}": shape.ffn % (tensor // (layout.expert if shape.experts else 1)) == 0,
        f"{shape.experts} experts": not shape.experts or shape.experts % layout.expert == 0,
    }
    for what, divides in rules.items():
        if not divides:
            raise ConfigError(f"engine layout: tensor {tensor}, expert {layout.expert} do not divide the model's {what}")
    if layout.pipeline > shape.layers:
        raise ConfigError(f"engine layout: pipeline {layout.pipeline} is more than the model's {shape.layers} layers")


def held_by(holdings: dict[str, Held], rank: int) -> Iterator[tuple[str, Box]]:
    """Yield the boxes of one rank by tensor."""
    for name, boxes in holdings.items():
        for box, ranks in boxes:
            if rank in ranks:
                yield name, box
