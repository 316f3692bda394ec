"""``megatron-hpt plan``: what a recipe will take on a cluster, before anything is started. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_hpt import recipe as recipes
from megatron_hpt.batch.packing import attention_parity, places, plan_micro_batches
from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.published import engine_item_bytes, planned_shape
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.fit import fit
from megatron_hpt.plan.flags import Flags, flags_of
from megatron_hpt.plan.layout import check_layout, check_lengths
from megatron_hpt.plan.memory import ITEM_BYTES, EngineMemory, TrainerMemory, checkpoint_bytes
from megatron_hpt.plan.nearest_layout import nearest
from megatron_hpt.plan.rollout_timing import Generation, Transfer, generation_s, transfer
from megatron_hpt.plan.shared_gpu import Moment
from megatron_hpt.plan.timing import Pass, StepSize, StepTime, message_bytes, micro_batch_s, reduce_bytes, train_s
from megatron_hpt.plan.topology import Topology, place

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of prompts that their demonstration teaches, from a policy that solves everything to one that solves nothing."""
DEFAULT_CLUSTER = Path(__file__).parents[2] / "recipes" / "clusters" / "h100x128.yaml"


@dataclass(frozen=True)
class Scenario:
    """One step in which a share of the prompts is taught by its demonstration: one row each, the others n."""

    share: float
    batch: StepSize
    generated: float
    """Tokens of rollouts, of all prompts."""
    training: StepTime
    generation: Generation
    seconds: float
    """Generation, training and transfer, one after the other."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that is printed."""

    config: Config
    cluster: ClusterConfig
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
    micro_batch: Pass
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


def of_recipe(source: str, overrides: list[str], cluster: Path | None, fill: float) -> RunPlan:
    """Plan a recipe.

    Args:
        cluster: a cluster file; None: as many nodes of 8 H100 as the recipe takes.
        fill: mean length of prompts and responses as a share of their limits.

    Raises:
        ConfigError, ModelError: what cannot run, with the nearest layout that can.
    """
    started = time.perf_counter()
    config = recipes.load(source, overrides).config
    return make(config, load_cluster(cluster) if cluster else _enough(config), fill, started)


def make(config: Config, cluster: ClusterConfig, fill: float, started: float) -> RunPlan:
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
    item = engine_item_bytes(config, ITEM_BYTES[config.model.dtype])
    servers = len(config.rollout.urls) or config.rollout.servers
    near = topology.nodes == 1 and not config.rollout.urls
    scenarios, sent = [], transfer(shape, config, cluster, servers, item, near)
    for share in SHARES:
        scenarios.append(_scenario(shape, config, cluster, fitting.engine, item, servers, share, fill, sent))
    least, flags = scenarios[0].batch, flags_of(config)
    return RunPlan(
        config=config,
        cluster=cluster,
        shape=shape,
        source=source,
        topology=topology,
        stage=fitting.stage,
        trainer=fitting.trainer,
        host=fitting.host,
        engine=None if config.rollout.urls else fitting.engine,
        moments=fitting.moments,
        largest_share=fitting.largest_share,
        micro_batch=_micro_batch(shape, config, cluster, flags, least),
        hidden=_hidden(shape, config, cluster, flags, least),
        scenarios=tuple(scenarios),
        transfer=sent,
        checkpoint=checkpoint_bytes(shape, config),
        bytes_by_link=_bytes_by_link(shape, config, cluster, least, sent, near),
        problems=fitting.problems,
        nearest=nearest(config, shape, cluster) if fitting.problems else None,
        seconds=time.perf_counter() - started,
    )


def _enough(config: Config) -> ClusterConfig:
    """Nodes of 8 H100: four times what the recipe takes, so that a layout that does not fit finds one that does."""
    plenty = load_cluster(DEFAULT_CLUSTER).model_copy(update={"name": "as many nodes as it takes"})
    devices = config.parallel.ranks + config.rollout.servers * config.rollout.tensor_parallel
    return plenty.model_copy(update={"nodes": 4 * (devices // plenty.gpus_per_node + 2)})


def batch_of(shape: ModelShape, config: Config, share: float, fill: float) -> StepSize:
    """What the coordinator hands over when a share of the prompts is taught by its demonstration.

    All rows have the mean length; the micro-batches are planned as the trainer plans them.
    """
    parallel, prompts = config.parallel, config.trainer.prompts_per_step
    taught = round(share * prompts)
    rows = taught + (prompts - taught) * config.rollout.samples_per_prompt
    length = max(2, round(fill * config.max_sequence_length))
    parity = attention_parity(
        shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, max(1, shape.experts_per_token)
    )
    planned = plan_micro_batches(
        [length] * rows,
        parallel.data,
        config.actor.micro_batch_tokens,
        attention_parity=parity,
        count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
    )
    fullest = max(len(part) for share_of_rank in planned for part in share_of_rank)
    padded = sum(places([length] * fullest, parallel.row_multiple, parallel.batch_multiple))
    return StepSize(rows, length, len(planned[0]), padded)


def _scenario(
    shape: ModelShape,
    config: Config,
    cluster: ClusterConfig,
    engine: EngineMemory,
    item: float,
    servers: int,
    share: float,
    fill: float,
    sent: Transfer,
) -> Scenario:
    batch = batch_of(shape, config, share, fill)
    prompt, response = fill * config.data.max_prompt_length, fill * config.data.max_response_length
    training = train_s(shape, config, cluster, flags_of(config), batch)
    generation = generation_s(shape, config, cluster, engine, item, servers, prompt, response)
    generated = config.trainer.prompts_per_step * config.rollout.samples_per_prompt * response
    seconds = training.total + generation.total + sent.seconds
    return Scenario(share, batch, generated, training, generation, seconds)


def _micro_batch(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, batch: StepSize) -> Pass:
    return micro_batch_s(shape, config, cluster, flags, batch.micro_batches, batch.micro_batch_tokens, batch.row_tokens)


def _hidden(shape: ModelShape, config: Config, cluster: ClusterConfig, flags: Flags, batch: StepSize) -> dict[str, float]:
    """Return what overlaps keep out of a step's training: the same step with none of them, less the step."""
    plain = flags.without_overlaps()
    one, alone = (asdict(_micro_batch(shape, config, cluster, these, batch)) for these in (flags, plain))
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
            reduce_bytes(shape, config) * parallel.ranks,
            parallel.tensor * parallel.context * parallel.data <= size,
        ),
        (f"transfer ({config.transfer.transport})", sent.sent, near),
    )
    return {f"{what}, {'inside nodes' if inside else 'between nodes'}": nbytes for what, nbytes, inside in kinds if nbytes}
