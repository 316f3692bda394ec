"""``megatron-hpt plan``: what a recipe will take on a cluster, before anything is started. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.published import planned_shape
from megatron_hpt.plan.assumptions import Assumptions, resized
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.fit import fit
from megatron_hpt.plan.flags import Flags, flags_of
from megatron_hpt.plan.layout import check_layout, check_lengths
from megatron_hpt.plan.memory import EngineMemory, TrainerMemory, checkpoint_bytes
from megatron_hpt.plan.nearest_layout import nearest
from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.rollouts.rollout_timing import Transfer
from megatron_hpt.plan.scenario import Scenario, batch_of, scenario
from megatron_hpt.plan.search.ranking import Ranking, search
from megatron_hpt.plan.shared_gpu import Moment
from megatron_hpt.plan.timing import StepSize, message_bytes, reduce_bytes, slowest_pass, train_s
from megatron_hpt.plan.topology import Topology, place

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of prompts that their demonstration teaches, from a policy that solves everything to one that solves nothing."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that is printed."""

    config: Config
    cluster: ClusterConfig
    lengths: Lengths
    shape: ModelShape
    source: Path
    """Where the model's config.json was read."""
    topology: Topology
    stage: int
    """The pipeline stage that needs the most memory."""
    trainer: TrainerMemory
    host: float
    """Bytes in the host memory of one node: resting optimizer state, and a checkpoint that is being written."""
    engine: EngineMemory | None
    """None: servers run already, and only their owner knows."""
    moments: tuple[Moment, ...]
    """Of a GPU that a trainer rank and an engine share; none: they share none."""
    largest_share: float
    """Of such a GPU, for an engine."""
    hidden: dict[str, float]
    """Seconds of communication beside computation in the first scenario's training: part → seconds, which are not counted."""
    scenarios: tuple[Scenario, ...]
    transfer: Transfer
    checkpoint: tuple[float, float]
    """Bytes of weights and of optimizer state."""
    bytes_by_link: dict[str, float]
    """What travels in a step without demonstrations, over all ranks: kind of link → bytes."""
    problems: tuple[str, ...]
    """Why it does not fit; none: it does."""
    nearest: tuple[str, ...] | None
    """Overrides of the nearest layout that fits; None: it fits, or none was found."""
    seconds: float
    """That it took to plan."""

    def require_fit(self) -> None:
        """Nothing to do if it fits.

        Raises:
            ConfigError: it does not; says why, and what to change.
        """
        if self.problems:
            raise ConfigError("\n".join([*self.problems, hint(self.nearest, self.cluster)]))


def hint(found: tuple[str, ...] | None, cluster: ClusterConfig) -> str:
    """What to change."""
    return (
        f"the nearest layout that fits: {' '.join(found)}" if found else f"no layout of it was found that fits {cluster.name}"
    )


def of_recipe(source: str, overrides: list[str], assumptions: Assumptions) -> RunPlan:
    """Plan a recipe.

    Raises:
        ConfigError, ModelError: what cannot run, with the nearest layout that can.
    """
    started = time.perf_counter()
    config = recipes.load(source, overrides).config
    return make(config, assumptions.cluster_of(config), assumptions.lengths_of(config), started)


def search_recipe(source: str, overrides: list[str], assumptions: Assumptions, share: float, max_lag: int) -> Ranking:
    """Search the fastest layouts of a recipe; without a cluster or a number of nodes, on as many as it takes.

    Args:
        share: of the prompts that are taught by their demonstration.
        max_lag: largest `rollout.max_lag` that is tried.

    Raises:
        ConfigError, ModelError: nothing fits.
    """
    config = recipes.load(source, overrides).config
    shape, _ = planned_shape(config)
    check_lengths(config, shape)
    cluster = assumptions.cluster_of(config)
    if assumptions.cluster is None and assumptions.nodes is None:
        cluster = resized(cluster, place(config, cluster).nodes)
    return search(config, shape, cluster, assumptions.lengths_of(config), share, max_lag)


def make(config: Config, cluster: ClusterConfig, lengths: Lengths, started: float) -> RunPlan:
    """The plan of a configuration.

    Args:
        started: time.perf_counter() at which planning began.

    Raises:
        ConfigError, ModelError: as `of_recipe`.
    """
    shape, source = planned_shape(config)
    check_lengths(config, shape)
    try:
        check_layout(config, shape)
        topology = place(config, cluster)
    except ConfigError as error:
        raise ConfigError(f"{error}\n{hint(nearest(config, shape, cluster), cluster)}") from None
    fitting = fit(config, shape, cluster, topology)
    near = topology.nodes == 1 and not config.rollout.urls
    batches = [(share, batch_of(shape, config, lengths, share)) for share in SHARES]
    scenarios = tuple(scenario(shape, config, cluster, fitting.engine, lengths, *each, near) for each in batches)
    least, flags, sent = scenarios[0].batch, flags_of(config), scenarios[0].transfer
    return RunPlan(
        config=config,
        cluster=cluster,
        lengths=lengths,
        shape=shape,
        source=source,
        topology=topology,
        stage=fitting.stage,
        trainer=fitting.trainer,
        host=fitting.host,
        engine=None if config.rollout.urls else fitting.engine,
        moments=fitting.moments,
        largest_share=fitting.largest_share,
        hidden=_hidden(shape, config, cluster, flags, least),
        scenarios=scenarios,
        transfer=sent,
        checkpoint=checkpoint_bytes(shape, config),
        bytes_by_link=_bytes_by_link(shape, config, cluster, least, sent, near),
        problems=fitting.problems,
        nearest=nearest(config, shape, cluster) if fitting.problems else None,
        seconds=time.perf_counter() - started,
    )


def _hidden(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, batch: StepSize) -> dict[str, float]:
    """Return what overlaps keep out of a step's training: the same step with none of them, less the step."""
    plain = flags.without_overlaps()
    one, alone = (asdict(slowest_pass(shape, config, cluster, these, batch)) for these in (flags, plain))
    step, slower = (asdict(train_s(shape, config, cluster, these, batch)) for these in (flags, plain))
    hidden = {part: batch.micro_batches * (alone[part] - one[part]) for part in one}
    hidden |= {part: slower[part] - step[part] for part in ("reduce", "gather")}
    return {part: seconds for part, seconds in hidden.items() if seconds > 0}


def _bytes_by_link(
    shape: ModelShape, config: Config, cluster: ClusterConfig, batch: StepSize, sent: Transfer, near: bool
) -> dict[str, float]:
    """Over all ranks in one step: what is between neighbours inside a node, and what leaves it."""
    parallel, size = config.parallel, cluster.gpus_per_node
    one = message_bytes(shape, config, batch.micro_batch_tokens / parallel.context)
    scale = batch.micro_batches * parallel.ranks
    expert = parallel.expert * parallel.expert_tensor_ranks
    kinds = (
        ("tensor parallel", one.tensor * scale, parallel.tensor <= size),
        ("context parallel", one.context * scale, parallel.tensor * parallel.context <= size),
        ("expert parallel", one.expert * scale, expert <= size),
        ("pipeline", one.pipeline * scale, parallel.ranks <= size),
        (
            "gradients and weights",
            reduce_bytes(shape, config) * batch.updates * parallel.ranks,
            parallel.tensor * parallel.context * parallel.data <= size,
        ),
        (f"transfer ({config.transfer.transport})", sent.sent, near),
    )
    return {f"{what}, {'inside nodes' if inside else 'between nodes'}": nbytes for what, nbytes, inside in kinds if nbytes}
