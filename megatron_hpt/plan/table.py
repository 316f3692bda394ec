"""A plan on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megatron_hpt.plan.memory import GIB, parameters
from megatron_hpt.plan.plan import RunPlan


def show(plan: RunPlan, console: Console) -> None:
    """Print everything, the verdict last."""
    total = parameters(plan.shape).total
    console.print(
        f"[bold]{plan.config.name}[/bold] on {plan.cluster.name}: {plan.topology.nodes} × {plan.cluster.gpus_per_node} "
        f"{plan.cluster.gpu.name}, {total / 1e9:.2f} · 10^9 parameters by {plan.source / 'config.json'}; planned in "
        f"{plan.seconds:.2f} s",
        highlight=False,
    )
    # What does not fit has no times: an engine without a cache decodes nothing.
    times = () if plan.problems else (_scenarios(plan), _steps(plan), _micro_batch(plan), _links(plan))
    for part in (_places(plan), _memory(plan), _cache(plan), *times):
        console.print(part, highlight=False)
    weights, state = plan.checkpoint
    console.print(
        f"checkpoint: {weights / 1e9:.1f} GB of weights + {state / 1e9:.1f} GB of optimizer state = "
        f"{(weights + state) / 1e9:.1f} GB, {(weights + state) / 1e9 / plan.cluster.storage_gbs:.0f} s of the file system at "
        f"{plan.cluster.storage_gbs:g} GB/s, written while training goes on; {plan.config.trainer.keep_checkpoints} are kept",
        highlight=False,
    )
    if not plan.problems:
        console.print(f"[green]fits[/green]: {_spare(plan):.1f} GiB to spare on the fullest trainer GPU", highlight=False)


def _spare(plan: RunPlan) -> float:
    """GiB that the trainer, and an engine on the same GPU, leave."""
    return plan.cluster.gpu.memory_gib - max((moment.total for moment in plan.moments), default=plan.trainer.total) / GIB


def _places(plan: RunPlan) -> Table:
    topology, parallel, rollout = plan.topology, plan.config.parallel, plan.config.rollout
    layout = {key: value for key, value in parallel.model_dump().items() if value not in (None, False, 1)}
    table = Table("who", "how many", "nodes", "layout", title="who runs where", title_justify="left")
    described = ", ".join(f"{key} {value}" for key, value in layout.items()) or "one rank"
    table.add_row("trainer", f"{parallel.ranks} ranks", _span(topology.trainer_nodes), described)
    turns = "they have its memory in turn" if rollout.sleep else "each keeps its memory while the other works"
    beside = f"on the trainer's GPUs; {turns}" if topology.is_colocated else ""
    engines = f"tensor {rollout.tensor_parallel}"
    if rollout.urls:
        table.add_row(f"{rollout.engine} engines", f"{len(rollout.urls)} servers", "elsewhere", "rollout.urls")
    else:
        table.add_row(
            f"{rollout.engine} engines",
            f"{rollout.servers} servers",
            _span(topology.engine_nodes),
            ", ".join(filter(None, (engines, beside))),
        )
    return table


def _span(nodes: tuple[int, ...]) -> str:
    return f"{nodes[0]} to {nodes[-1]}" if len(nodes) > 1 else str(nodes[0])


def _memory(plan: RunPlan) -> Table:
    table = Table("rank", "what", "GiB", title="memory of the fullest ranks", title_justify="left")
    stage = f"trainer, stage {plan.stage}"
    parts = asdict(plan.trainer)
    resting = " (in the passes it rests in host memory)" if parts.pop("rests") else ""
    parts.pop("leaves")
    rows = [(stage, what + (resting if what == "optimizer" else ""), nbytes) for what, nbytes in parts.items() if nbytes]
    rows.append((stage, "at most", plan.trainer.total))
    if plan.engine is not None:
        names = {"weights": plan.engine.weights, "allowance": plan.engine.allowance, "cache": max(0.0, plan.engine.cache)}
        rows += [("engine", what, nbytes) for what, nbytes in names.items()]
        rows.append(("engine", "at most", plan.engine.total))
    rows += [("both on one GPU", moment.what, moment.total) for moment in plan.moments]
    rows.append(("a node's host", "resting state, checkpoint that is being written", plan.host))
    for rank, what, nbytes in rows:
        table.add_row(rank, what, f"{nbytes / GIB:.1f}", end_section=what == "at most")
    return table


def _cache(plan: RunPlan) -> str:
    """What the engines' memory is good for."""
    if plan.engine is None:
        return "the memory of servers that run already (rollout.urls) is their owner's"
    longest = plan.engine.tokens // plan.config.max_sequence_length
    text = f"a server's cache holds {plan.engine.tokens:,} tokens: {longest} sequences of full length"
    if not plan.moments:
        return text
    return f"{text}; rollout.gpu_memory_share={plan.config.rollout.gpu_memory_share:g}, at most {plan.largest_share:g} fits"


def _scenarios(plan: RunPlan) -> Table:
    columns = ("taught by demonstration", "rows", "tokens trained", "micro-batches a rank", "generation s", "training s")
    more = ("transfer s", "step s", "trainer idle", "engines idle", "rollout tokens")
    table = Table(*columns, *more, title=f"one step{_ahead(plan)}", title_justify="left")
    for scenario in plan.scenarios:
        batch = scenario.batch
        table.add_row(
            *(f"{scenario.share:.0%}", f"{batch.rows:,}", f"{batch.tokens:,.0f}"),
            f"{batch.micro_batches} × {batch.micro_batch_tokens:,.0f}",
            *(f"{scenario.generation.total:.1f}", f"{scenario.training.total:.1f}", f"{plan.transfer.seconds:.2f}"),
            *(f"{scenario.seconds:.1f}", f"{scenario.timeline.trainer_idle:.0%}", f"{scenario.timeline.engines_idle:.0%}"),
            f"{scenario.generated:,.0f}",
        )
    return table


def _ahead(plan: RunPlan) -> str:
    lag = plan.config.rollout.max_lag
    return f"; engines work up to {lag} batches ahead (generation s: a batch alone on them)" if lag else ""


def _steps(plan: RunPlan) -> str:
    """What the scenarios mean for the run."""
    trainer, first, last = plan.config.trainer, plan.scenarios[0], plan.scenarios[-1]
    least, most = sorted(trainer.steps * scenario.seconds / 3600 for scenario in (first, last))
    return (
        f"{trainer.prompts_per_step} prompts, each gives {plan.config.rollout.samples_per_prompt} rows or its demonstration. "
        f"Lengths: {plan.lengths.origin}. {trainer.steps} steps: {least:.1f} to {most:.1f} h without evaluation; a server "
        f"begins with {first.generation.running} sequences, and decodes {first.timeline.running:.0f} on average."
    )


def _micro_batch(plan: RunPlan) -> Table:
    step = plan.scenarios[0]
    beside = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in plan.hidden.items())
    caption = f"beside computation, not counted: {beside}" if beside else None
    title = "training s of the first row, by part"
    table = Table("part", "s", "share", title=title, title_justify="left", caption=caption, caption_justify="left")
    times = f" × {step.batch.micro_batches} micro-batches"
    rows = ((what + (times if hasattr(step.micro_batch, what) else ""), s) for what, s in step.training_parts.items())
    _add_shares(table, ((what, seconds) for what, seconds in rows if seconds), step.training.total)
    return table


def _add_shares(table: Table, parts: Iterable[tuple[str, float]], total: float) -> None:
    for what, seconds in parts:
        table.add_row(what, f"{seconds:.3f}", f"{seconds / total:.1%}")


def _links(plan: RunPlan) -> Table:
    table = Table("what travels in the first row's step", "GB over all ranks", title="links", title_justify="left")
    for what, nbytes in plan.bytes_by_link.items():
        table.add_row(what, f"{nbytes / 1e9:,.1f}")
    return table
