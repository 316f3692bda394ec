"""The nearest layout that runs: what `plan` answers to one that does not. Pure; no torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_hpt.config import Config, RolloutConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.fit import fit
from megatron_hpt.plan.layout import check_layout
from megatron_hpt.plan.topology import place

Less = tuple[dict[Any, Any], float]
"""Given value of a setting → the one that needs less memory, and its distance."""
_BUYS: dict[tuple[str, str], Less] = {
    ("actor", "recompute"): ({"none": "full", "selective": "full"}, 0.5),
    ("actor", "offload"): ({"none": "optimizer"}, 0.75),
}
"""Settings that buy memory."""
_BUYS_SHARED: dict[tuple[str, str], Less] = {
    **_BUYS,
    ("actor", "offload"): ({"none": "all", "optimizer": "all"}, 0.75),
    ("rollout", "sleep"): ({False: True}, 0.5),
}
"""Where engines are on the trainer's GPUs."""
_SHARE = ("rollout", "gpu_memory_share")
_MORE_RANKS = 3.0
"""A layout of twice as many ranks is as far away as three doublings of anything else."""
_ANY_CHANGE = 0.25
"""Of every key that has another value."""
_DEEPEST = 16
"""Pipeline stages to try at most."""
_DATA = ("parallel", "data")
_PARALLEL = ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "data", "expert", "expert_tensor")
_KEYS = (
    *(("parallel", key) for key in _PARALLEL),
    *_BUYS_SHARED,
    ("rollout", "tensor_parallel"),
    ("rollout", "servers"),
    _SHARE,
)

Values = dict[tuple[str, str], Any]
"""(section, key) → value."""


def nearest(config: Config, shape: ModelShape, cluster: ClusterConfig) -> tuple[str, ...] | None:
    """Overrides that make the recipe run on the cluster with the fewest and smallest changes; None: none found.

    The engines' layout, the trainer's, and what buys memory are changed; lengths, batch and model are not.
    """
    given = {key: getattr(getattr(config, key[0]), key[1]) for key in _KEYS}
    buys = _BUYS_SHARED if config.transfer.shares_gpus else _BUYS
    others = [memory | engines for memory in _memory(given, buys) for engines in _engines(config, cluster)]
    layouts = [layout for layout in _layouts(config, shape, cluster) if _divides(_applied(config, layout), shape)]
    candidates = (layout | other for layout in layouts for other in others)
    for values in sorted(candidates, key=lambda values: _distance(given, values)):
        if found := _fitting(config, values, shape, cluster):
            return tuple(f"{'.'.join(key)}={_text(value)}" for key, value in found.items() if value != given[key])
    return None


def _divides(config: Config, shape: ModelShape) -> bool:
    try:
        check_layout(config.model_copy(update={"rollout": RolloutConfig()}), shape)  # engines come with the others
    except ConfigError:
        return False
    return True


def _fitting(config: Config, values: Values, shape: ModelShape, cluster: ClusterConfig) -> Values | None:
    """These values if they run, or if they do with as large a share of the GPU for an engine as the trainer leaves."""
    changed = _applied(config, values)
    try:
        check_layout(changed, shape)
        found = fit(changed, shape, cluster, place(changed, cluster))
    except ConfigError:
        return None
    if not found.problems:
        return values
    smaller = 0 < found.largest_share < changed.rollout.gpu_memory_share and _SHARE not in values
    return _fitting(config, values | {_SHARE: found.largest_share}, shape, cluster) if found.moments and smaller else None


def _layouts(config: Config, shape: ModelShape, cluster: ClusterConfig) -> Iterator[Values]:
    """Of the trainer, with as many ranks as given, near it, or as the cluster has beside the engines."""
    size, parallel, rollout = cluster.gpus_per_node, config.parallel, config.rollout
    totals = {*_ranks(parallel.ranks, size, cluster.gpus), cluster.gpus - rollout.servers * rollout.tensor_parallel}
    tensors = [n for n in _divisors(shape.heads) if n <= size]
    pipelines = [n for n in _divisors(shape.layers) if n <= _DEEPEST]
    experts = {1, parallel.expert, *(n for n in _divisors(shape.experts) if n <= size)}
    for tensor, pipeline, context, expert in itertools.product(tensors, pipelines, {1, parallel.context}, experts):
        model, piece = tensor * pipeline * context, parallel.virtual_pipeline
        datas = {parallel.data, *(ranks // model for ranks in totals)}
        for data in (n for n in datas if 0 < n * model <= cluster.gpus):
            yield {
                ("parallel", "tensor"): tensor,
                ("parallel", "pipeline"): pipeline,
                ("parallel", "virtual_pipeline"): piece if pipeline > 1 and shape.layers // pipeline % piece == 0 else 1,
                ("parallel", "context"): context,
                ("parallel", "sequence"): tensor > 1 and (parallel.sequence or bool(shape.experts)),
                ("parallel", "expert"): expert,
                ("parallel", "expert_tensor"): parallel.expert_tensor if shape.experts else None,
                _DATA: data,
            }


def _memory(given: Values, buys: dict[tuple[str, str], Less]) -> list[Values]:
    """Settings that buy memory: as given, and each way to need less."""
    choices = ((key, sorted({given[key], less.get(given[key], given[key])})) for key, (less, _) in buys.items())
    keys, values = zip(*choices, strict=True)
    return [dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*values)]


def _engines(config: Config, cluster: ClusterConfig) -> list[Values]:
    """Servers of at least as many ranks, on as many GPUs as given or as the trainer leaves."""
    given, most = config.rollout.tensor_parallel, cluster.gpus_per_node
    devices = {config.rollout.servers * given, max(1, cluster.gpus - config.parallel.ranks)}
    widths = [n for n in _divisors(most) if n >= min(given, most)]
    return [
        {("rollout", "tensor_parallel"): width, ("rollout", "servers"): max(1, n // width)} for width in widths for n in devices
    ]


def _ranks(given: int, size: int, most: int) -> set[int]:
    """Numbers of trainer ranks to try: as given, to whole nodes, halves and doubles, and all there are."""
    down, up = max(1, given // size) * size, -(-given // size) * size
    return {n for n in (given, down, up, 2 * up, 4 * up, down // 2, most // 2, most) if 0 < n <= most}


def _distance(given: Values, values: Values) -> tuple[float, list[str]]:
    """Doublings from one to the other, a little for every changed key; the values themselves make the order total."""
    changed = [key for key, value in values.items() if value != given[key]]
    ranks = [math.prod(v["parallel", key] for key in ("tensor", "pipeline", "context", "data")) for v in (given, values)]
    total = _MORE_RANKS * abs(math.log2(ranks[1] / ranks[0])) + _ANY_CHANGE * len(changed)
    return total + sum(_change(key, given[key], values[key]) for key in changed), [str(value) for value in values.values()]


def _change(key: tuple[str, str], old: Any, new: Any) -> float:
    if key in _BUYS_SHARED:
        return _BUYS_SHARED[key][1]
    if key == _DATA or isinstance(new, bool) or None in (old, new):  # data parallel ranks are counted with all ranks
        return 0.0
    return abs(math.log2(new / old))


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
