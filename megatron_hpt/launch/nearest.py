"""The nearest layout that runs: what `plan` answers to one that does not. Pure; no torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch.cluster import ClusterConfig
from megatron_hpt.launch.fit import fit
from megatron_hpt.launch.layout import check_layout
from megatron_hpt.launch.topology import place
from megatron_hpt.weights.hf_config import ModelShape

_CHOICES = {
    ("actor", "recompute"): (("none", 0.0), ("selective", 0.0), ("full", 0.5)),
    ("actor", "offload"): (("none", 0.0), ("optimizer", 0.75), ("all", 1.0)),
}
"""Settings that buy memory, each value with its distance from the one before."""
_MORE_RANKS = 3.0
"""A layout of twice as many ranks is as far away as three doublings of anything else."""

Values = dict[tuple[str, str], Any]
"""(section, key) → value."""


def nearest(config: Config, shape: ModelShape, cluster: ClusterConfig) -> tuple[str, ...] | None:
    """Overrides that make the recipe run on the cluster with the fewest and smallest changes; None: none found.

    The engines' layout, the trainer's, and what buys memory are changed; lengths, batch and model are not.
    """
    given = {key: getattr(getattr(config, key[0]), key[1]) for key in _keys()}
    candidates = sorted(_candidates(config, shape, cluster, given), key=lambda values: _distance(given, values))
    for values in candidates:
        changed = _applied(config, values)
        try:
            check_layout(changed, shape)
            if fit(changed, shape, cluster, place(changed, cluster)).problems:
                continue
        except ConfigError:
            continue
        return tuple(f"{'.'.join(key)}={_text(value)}" for key, value in values.items() if value != given[key])
    return None


def _keys() -> list[tuple[str, str]]:
    parallel = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "data", "expert", "expert_tensor")
    return [*(("parallel", key) for key in parallel), *_CHOICES, ("rollout", "tensor_parallel"), ("rollout", "servers")]


def _candidates(config: Config, shape: ModelShape, cluster: ClusterConfig, given: Values) -> Iterator[Values]:
    size, parallel, rollout = cluster.gpus_per_node, config.parallel, config.rollout
    tensors = [n for n in _divisors(shape.heads) if n <= size]
    pipelines = [n for n in _divisors(shape.layers) if n <= 16]
    contexts = sorted({1, parallel.context})
    engines = [n for n in tensors if n >= rollout.tensor_parallel] or [size]
    totals = sorted({rollout.servers, max(1, (cluster.gpus - parallel.ranks) // rollout.tensor_parallel)})
    experts = sorted({1, parallel.expert, *(n for n in _divisors(shape.experts) if n <= size)}) if shape.experts else [1]
    memory = list(itertools.product(*(_from(values, given[key]) for key, values in _CHOICES.items())))
    for tensor, pipeline, context, expert in itertools.product(tensors, pipelines, contexts, experts):
        model = tensor * pipeline * context
        piece = parallel.virtual_pipeline
        layout = {
            ("parallel", "tensor"): tensor,
            ("parallel", "pipeline"): pipeline,
            ("parallel", "virtual_pipeline"): piece if pipeline > 1 and shape.layers // pipeline % piece == 0 else 1,
            ("parallel", "context"): context,
            ("parallel", "sequence"): tensor > 1 and (parallel.sequence or bool(shape.experts)),
            ("parallel", "expert"): expert,
            ("parallel", "expert_tensor"): parallel.expert_tensor if shape.experts else None,
        }
        for data in sorted({max(1, ranks // model) for ranks in _ranks(parallel.ranks, size, cluster.gpus)}):
            if model * data > cluster.gpus:
                continue
            for (recompute, offload), width, servers in itertools.product(memory, engines, totals):
                yield layout | {
                    ("parallel", "data"): data,
                    ("actor", "recompute"): recompute,
                    ("actor", "offload"): offload,
                    ("rollout", "tensor_parallel"): width,
                    ("rollout", "servers"): max(1, servers * rollout.tensor_parallel // width),
                }


def _ranks(given: int, size: int, most: int) -> set[int]:
    """Numbers of trainer ranks to try: as given, to whole nodes, halves and doubles, and all there are."""
    down, up = max(1, given // size) * size, -(-given // size) * size
    return {n for n in (given, down, up, 2 * up, 4 * up, down // 2, most // 2, most) if 0 < n <= most}


def _from(values: tuple[tuple[str, float], ...], given: str) -> list[str]:
    """The given value and those that buy more memory."""
    names = [name for name, _ in values]
    return names[names.index(given) :]


def _distance(given: Values, values: Values) -> tuple[float, list[str]]:
    total = 0.0
    for key, value in values.items():
        if value == given[key]:
            continue
        if key in _CHOICES:
            names = [name for name, _ in _CHOICES[key]]
            total += sum(cost for _, cost in _CHOICES[key][names.index(given[key]) + 1 : names.index(value) + 1])
        elif isinstance(value, bool) or value is None or given[key] is None:
            total += 0.25
        else:
            total += abs(math.log2(value / given[key]))
    ranks = [math.prod(v[("parallel", key)] for key in ("tensor", "pipeline", "context", "data")) for v in (given, values)]
    return total + _MORE_RANKS * abs(math.log2(ranks[1] / ranks[0])), [str(value) for value in values.values()]


def _applied(config: Config, values: Values) -> Config:
    """The recipe with these values; they are of the right types, so nothing is validated again."""
    sections = {section: {} for section, _ in values}
    for (section, key), value in values.items():
        sections[section][key] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=changes) for section, changes in sections.items()}
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _text(value: Any) -> str:
    """As YAML."""
    return value if isinstance(value, str) else json.dumps(value)
