"""A transfer planned from a recipe or from layouts, and printed: what `tools/weight_transfer.py plan` shows."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hpt import recipe as recipes
from megatron_hpt.config import ParallelConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape, shape_of_any
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.transfer.layouts import EngineLayout, actor_holdings, engine_holdings
from megatron_hpt.transfer.plan import TransferPlan, make_plan
from megatron_hpt.transfer.transports import TRANSPORTS

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class PlanCase:
    """What is to be planned: a model, the actor's layout and the engines' one, and the dtype that travels."""

    shape: ModelShape
    actor: ParallelConfig
    engine: EngineLayout
    engines: int
    dtype: str


def of_source(source: str, actor: str, engine: str, engines: int, dtype: str) -> PlanCase:
    """Read what is to be planned from a recipe, or from a model folder with layouts given beside it.

    Raises:
        ConfigError: the source is neither, or a layout is not one.
        ModelError: a configuration that cannot be read.
    """
    if dtype not in _ITEM_BYTES:
        raise ConfigError(f"--dtype: given {dtype!r}; allowed: {', '.join(_ITEM_BYTES)}")
    if (Path(source) / "config.json").is_file():
        return PlanCase(
            shape_of_any(source),
            ParallelConfig(**_numbers("--actor", actor, set(ParallelConfig.model_fields))),
            EngineLayout(**_numbers("--engine", engine, {"tensor", "pipeline", "expert"})),
            engines or 1,
            dtype,
        )
    config = recipes.load(source, []).config
    if actor or engine:
        raise ConfigError("--actor and --engine belong to a model folder; a recipe has layouts of its own")
    count = engines or len(config.rollout.urls) or config.rollout.servers
    layout = EngineLayout(config.rollout.tensor_parallel)
    return PlanCase(shape_of_any(config.model.path, config.model.overrides), config.parallel, layout, count, config.model.dtype)


def _numbers(option: str, text: str, allowed: set[str]) -> dict[str, int | bool]:
    found: dict[str, int | bool] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in allowed or not (value.isdecimal() or value in ("true", "false")):
            raise ConfigError(f"{option}: {part!r} is not one of {', '.join(sorted(allowed))} with a number, e.g. tensor=8")
        found[key] = value == "true" if value in ("true", "false") else int(value)
    return found


def make(case: PlanCase, transport: str) -> TransferPlan:
    """Make the plan of a case.

    Raises:
        ConfigError: an unknown transport, or layouts that do not divide the model.
    """
    if transport not in TRANSPORTS:
        raise ConfigError(f"--transport: given {transport!r}; allowed: {', '.join(TRANSPORTS)}")
    tensors = hf_tensor_shapes(case.shape)
    engines = [(engine_holdings(tensors, case.shape, case.engine), case.engine.ranks)] * case.engines
    actor = actor_holdings(tensors, case.shape, case.actor)
    multicast = TRANSPORTS[transport].multicast
    items = dict.fromkeys(tensors, _ITEM_BYTES[case.dtype])
    return make_plan(tensors, items, actor, engines, case.actor.ranks, multicast=multicast)


def show(console: Console, case: PlanCase, plan: TransferPlan, send_gbs: float, receive_gbs: float, seconds: float) -> None:
    """Print a plan as a table."""
    parameters = sum(map(math.prod, hf_tensor_shapes(case.shape).values()))
    console.print(
        f"{parameters / 1e9:.2f} · 10^9 parameters in {case.dtype}: {plan.senders} actor ranks → {case.engines} engines of "
        f"{case.engine.ranks} ranks; {len(plan.sends)} boxes; planned in {seconds:.1f} s"
    )
    table = Table("10^9 bytes", "ranks", "in all", "least", "mean", "largest", "largest / mean", title=None)
    for side, loads in (("sent", plan.sent), ("received", plan.received)):
        mean = statistics.fmean(loads)
        figures = (sum(loads), min(loads), mean, max(loads))
        table.add_row(side, str(len(loads)), *(f"{n / 1e9:.3f}" for n in figures), f"{max(loads) / mean:.3f}" if mean else "-")
    console.print(table)
    console.print(
        f"at {send_gbs:g} · 10^9 bytes/s a sender and {receive_gbs:g} a receiver: {plan.seconds(send_gbs, receive_gbs):.3f} s "
        f"(no plan is faster than {plan.lower_bound_s(send_gbs, receive_gbs):.3f} s)"
    )
