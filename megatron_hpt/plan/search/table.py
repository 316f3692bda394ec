"""The answer to a search on the terminal, and the winner's settings as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_hpt.config import Config
from megatron_hpt.files import write_whole
from megatron_hpt.plan.search.ranking import Ranked, Ranking
from megatron_hpt.settings.values import dump

WRITTEN = {
    "parallel": ("tensor", "pipeline", "virtual_pipeline", "context", "sequence", "expert", "expert_tensor", "data"),
    "actor": ("micro_batch_tokens", "recompute", "offload"),
    "rollout": ("servers", "tensor_parallel", "max_running", "gpu_memory_share", "sleep", "max_lag"),
    "transfer": ("transport",),
}
"""Settings that a search chooses: section → keys."""


def settings_of(config: Config) -> dict[str, dict[str, Any]]:
    """Return what a search chooses, as sections of a configuration."""
    tree = config.model_dump(mode="json")
    return {section: {key: tree[section][key] for key in keys} for section, keys in WRITTEN.items()}


def write(path: Path, ranking: Ranking) -> None:
    """Write the winner's settings, which a recipe takes as ``@FILE``.

    Raises:
        OSError: the file cannot be written.
    """
    best = ranking.fastest[0]
    head = f"# {best.config.name} on {ranking.cluster.name}: {best.seconds:.1f} s a step by megatron-hpt plan --search\n"
    write_whole(path, head + dump(settings_of(best.config)))


def show(ranking: Ranking, console: Console) -> None:
    """Print the fastest layouts, the recipe's own, and what less lag costs."""
    best, cluster = ranking.fastest[0], ranking.cluster
    console.print(
        f"[bold]{best.config.name}[/bold] on {cluster.name}: {cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}; "
        f"{ranking.timed:,} layouts timed in {ranking.seconds:.1f} s. Lengths: {ranking.lengths.origin}; "
        f"{ranking.share:.0%} of prompts taught by demonstrations",
        highlight=False,
    )
    table = Table(
        *("s a step", "trainer idle", "engines idle", "trainer", "micro-batches", "engines", "max_lag", "GiB spare", ""),
        title="the fastest layouts",
        title_justify="left",
    )
    for ranked in ranking.fastest:
        table.add_row(*_row(ranked), "" if ranked is best else why_slower(best, ranked))
    if ranking.given and ranking.given not in ranking.fastest:
        table.add_section()
        table.add_row(*_row(ranking.given), f"the recipe's own: {why_slower(best, ranking.given)}")
    console.print(table, highlight=False)
    if not ranking.given:
        console.print(f"the recipe's own layout does not fit {cluster.name}", highlight=False)
    for lag, ranked in sorted(ranking.by_lag.items()):
        if lag != best.config.rollout.max_lag:
            console.print(f"the fastest with rollout.max_lag={lag}: {_in_words(ranked)}", highlight=False)


def _row(ranked: Ranked) -> tuple[str, ...]:
    parallel, actor, rollout = ranked.config.parallel, ranked.config.actor, ranked.config.rollout
    timeline = ranked.scenario.timeline
    kept = [f"recompute {actor.recompute}"] if actor.recompute != "none" else []
    kept += [f"offload {actor.offload}"] if actor.offload != "none" else []
    return (
        *(f"{ranked.seconds:.1f}", f"{timeline.trainer_idle:.0%}", f"{timeline.engines_idle:.0%}"),
        f"{parallel.ranks}: {described(ranked.config)}",
        ", ".join([f"{actor.micro_batch_tokens:,}", *kept]),
        _engines(ranked.config) + f", {timeline.running:.0f} of {rollout.max_running} run",
        *(str(rollout.max_lag), f"{ranked.spare_gib:.1f}"),
    )


def described(config: Config) -> str:
    """Return the trainer's layout in words."""
    layout = {key: value for key, value in config.parallel.model_dump().items() if value not in (None, False, 1, True)}
    return ", ".join(f"{key} {value}" for key, value in layout.items()) or "one rank"


def _engines(config: Config) -> str:
    rollout = config.rollout
    if rollout.urls:
        return f"{len(rollout.urls)} servers of rollout.urls"
    return f"{rollout.servers} × tensor {rollout.tensor_parallel}" + (", in turns" if config.transfer.shares_gpus else "")


def _in_words(ranked: Ranked) -> str:
    timeline = ranked.scenario.timeline
    return (
        f"{ranked.seconds:.1f} s a step, trainer idle {timeline.trainer_idle:.0%}, engines {timeline.engines_idle:.0%}: "
        f"{ranked.config.parallel.ranks} trainer ranks ({described(ranked.config)}), engines {_engines(ranked.config)}"
    )


def why_slower(first: Ranked, other: Ranked) -> str:
    """Return what of a layout takes longer than the same of a faster one."""
    if other.config.rollout.max_lag < first.config.rollout.max_lag:
        ahead = other.config.rollout.max_lag
        return f"engines work {ahead} batches ahead" if ahead else "rollouts and training alternate"
    mine, best = other.scenario, first.scenario
    training = mine.training.total - best.training.total
    rollouts = mine.generation.total - best.generation.total
    if max(training, rollouts) <= 0:
        return f"transfer +{mine.transfer.seconds - best.transfer.seconds:.1f} s"
    if training < rollouts:
        return f"rollouts +{rollouts:.1f} s"
    parts, before = mine.training_parts, best.training_parts
    part = max(parts, key=lambda name: parts[name] - before[name])
    return f"training +{training:.1f} s ({part} +{parts[part] - before[part]:.1f})"
