"""What a Megatron checkpoint of a model holds: tensors, the chunks that ranks of a layout write, files. Pure; no torch.

Megatron's distributed format (megatron/core/dist_checkpointing, torch_dist) keeps all layers' copies of a parameter as one
tensor ``[layers, …]`` (``[layers, experts, …]`` for experts) and every rank's shard as a chunk of it, so any layout can load
what another has written; a layout only decides how the chunks are cut and in which file they lie.
`tests/models/test_conversion.py` compares this with what Megatron itself writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_hpt.config import ParallelConfig
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import Parameter, Place, Rule, Sizes, parameters

_SMALLEST_FILE, _LARGEST_FILE, _FILES = 64 << 20, 2 << 30, 16


@dataclass(frozen=True)
class Stored:
    """A parameter, or one of the parts that are stacked in it, and where the checkpoint has it."""

    parameter: Parameter
    part: Rule
    index: int
    """Place among the parameter's parts."""

    @cached_property
    def key(self) -> str:
        """Name of the checkpoint's tensor, the same for all layers and experts."""
        joined = self.parameter.pattern.replace(".layers.{}.", ".layers.")
        return joined.replace(".experts.local_experts.{}.", ".experts.experts.")

    def sizes(self, shape: ModelShape, ranks: int = 1) -> Sizes:
        """Return the shape of the checkpoint's tensor.

        Args:
            ranks: number of tensor parallel ranks that have written it, which pad the vocabulary.
        """
        leading = (shape.layers, shape.experts)[: len(self.parameter.indices)]
        return (*leading, *self.parameter.rule.sizes(shape, ranks))

    def box(self, shape: ModelShape, place: Place | None = None) -> tuple[Sizes, Sizes]:
        """Return offset and extent of this part in the checkpoint's tensor.

        Args:
            place: the rank whose shard is meant; None: all of the part without padding.
        """
        leading = self.parameter.indices
        if place is None:
            first, extent = 0, self.part.sizes(shape)
        else:
            extent = self.part.shard_sizes(shape, place.size)
            first = 0 if self.part.cut is None else place.rank * extent[self.part.cut]
        offset = [first if d == self.part.cut else 0 for d in range(len(extent))]
        offset[0] += self.index * self.part.sizes(shape, place.size if place else 1)[0]
        return (*leading, *offset), (*(1 for _ in leading), *extent)


def stored(shape: ModelShape) -> Iterator[Stored]:
    """Yield everything that a checkpoint of the model holds, in the model's order."""
    for parameter in parameters(shape):
        for index, part in enumerate(parameter.rule.parts):
            yield Stored(parameter, part, index)


@dataclass(frozen=True)
class Chunk:
    """What one rank of a layout writes of one stored tensor."""

    stored: Stored
    place: Place
    sizes: Sizes
    offset: Sizes
    extent: Sizes

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.extent)


def chunks_by_rank(shape: ModelShape, layout: ParallelConfig) -> list[list[Chunk]]:
    """Return the chunks of every rank that writes, in the model's order; replicas write nothing.

    Raises:
        ModelError: the ranks do not divide a tensor.
    """
    expert_tensor = layout.expert_tensor_ranks
    width = max(layout.tensor, expert_tensor * layout.expert)
    layers_a_piece = shape.layers // (layout.pipeline * layout.virtual_pipeline)
    ranks: list[list[Chunk]] = [[] for _ in range(layout.pipeline * width)]
    for item in stored(shape):
        indices = item.parameter.indices
        expert = indices[1] if len(indices) == 2 else None
        size = layout.tensor if expert is None else expert_tensor
        first = width * _stage(item, layout, layers_a_piece)
        first += 0 if expert is None else expert_tensor * (expert * layout.expert // shape.experts)
        for rank in range(1 if item.part.cut is None else size):
            place = Place(rank, size)
            ranks[first + rank].append(Chunk(item, place, item.sizes(shape, size), *item.box(shape, place)))
    return ranks


def _stage(item: Stored, layout: ParallelConfig, layers_a_piece: int) -> int:
    if item.parameter.indices:
        return item.parameter.indices[0] // layers_a_piece % layout.pipeline
    return 0 if item.key.startswith("embedding.") else layout.pipeline - 1


def files(ranks: Iterable[list[Chunk]], itemsize: int) -> list[list[Chunk]]:
    """Share chunks out to files, each of one rank and small, so that interrupted work loses little and two workers have some.

    Args:
        itemsize: bytes of an element.
    """
    ranks = list(ranks)
    total = itemsize * sum(chunk.volume for chunks in ranks for chunk in chunks)
    limit = max(_SMALLEST_FILE, min(_LARGEST_FILE, total // _FILES))
    groups: list[list[Chunk]] = []
    for chunks in ranks:
        size = limit
        for chunk in chunks:
            if size >= limit:
                groups.append([])
                size = 0
            groups[-1].append(chunk)
            size += chunk.volume * itemsize
    return groups
