"""One step of a layout: what is generated and trained, what that takes, and who waits. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

from megatron_hpt.batch.packing import attention_parity, plan_micro_batches
from megatron_hpt.config import Config
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.published import engine_item_bytes
from megatron_hpt.plan.cluster import ClusterConfig
from megatron_hpt.plan.flags import flags_of
from megatron_hpt.plan.memory import ITEM_BYTES, EngineMemory
from megatron_hpt.plan.rollouts.lengths import Lengths
from megatron_hpt.plan.rollouts.rollout_timing import Transfer, decoding, transfer
from megatron_hpt.plan.rollouts.timeline import BatchWork, Generation, Timeline, alone, timeline
from megatron_hpt.plan.timing import Pass, StepSize, StepTime, optimizer_steps, slowest_pass, train_s


@dataclass(frozen=True)
class Scenario:
    """One step in which a share of the prompts is taught by its demonstration: one row each, the others n."""

    share: float
    batch: StepSize
    generated: float
    """Tokens of rollouts, of all prompts."""
    micro_batch: Pass
    """Of a mean one."""
    training: StepTime
    generation: Generation
    """Alone on the engines, whatever the lag."""
    transfer: Transfer
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.timeline.seconds

    @property
    def training_parts(self) -> dict[str, float]:
        """Seconds of training by part: what of the passes of all micro-batches, and what comes around them."""
        passes = {what: self.batch.micro_batches * seconds for what, seconds in asdict(self.micro_batch).items()}
        return passes | {what: seconds for what, seconds in asdict(self.training).items() if what != "passes"}


def scenario(
    shape: ModelShape,
    config: Config,
    cluster: ClusterConfig,
    engine: EngineMemory,
    lengths: Lengths,
    share: float,
    batch: StepSize,
    near: bool,
) -> Scenario:
    """Return one step of a layout that fits.

    Args:
        engine: memory of a rank of an engine.
        share: of the prompts that their demonstration teaches.
        batch: what is trained then.
        near: trainer and engines are on one node.
    """
    flags = flags_of(config)
    one = slowest_pass(shape, config, cluster, flags, batch)
    training = train_s(shape, config, cluster, flags, batch)
    sent = transfer_of(shape, config, cluster, near)
    work = work_of(shape, config, cluster, engine, lengths, training.total, sent.seconds)
    generated = config.trainer.prompts_per_step * config.rollout.samples_per_prompt * lengths.response
    steady = timeline(work, config.rollout.max_lag)
    return Scenario(share, batch, generated, one, training, alone(work), sent, steady)


def work_of(
    shape: ModelShape,
    config: Config,
    cluster: ClusterConfig,
    engine: EngineMemory,
    lengths: Lengths,
    training_s: float,
    transfer_s: float,
) -> BatchWork:
    """Return what one step asks of one of the servers, and of the trainer."""
    item = engine_item_bytes(config, ITEM_BYTES[config.model.dtype])
    prompts = max(config.trainer.prompts_per_step / servers_of(config), 1 / config.rollout.samples_per_prompt)
    return BatchWork(
        decoding(shape, config, cluster, engine, item, lengths),
        lengths,
        prompts,
        config.rollout.samples_per_prompt,
        training_s,
        transfer_s,
        config.transfer.in_flight,
    )


def transfer_of(shape: ModelShape, config: Config, cluster: ClusterConfig, near: bool) -> Transfer:
    """Return the way of one version to all engines."""
    item = engine_item_bytes(config, ITEM_BYTES[config.model.dtype])
    return transfer(shape, config, cluster, servers_of(config), item, near)


def servers_of(config: Config) -> int:
    """Return the number of servers, started ones or the user's own."""
    return len(config.rollout.urls) or config.rollout.servers


def batch_of(shape: ModelShape, config: Config, lengths: Lengths, share: float) -> StepSize:
    """Return what the coordinator hands over when a share of the prompts is taught by its demonstration."""
    return batches(shape, config, lengths, share)(config)


def batches(shape: ModelShape, config: Config, lengths: Lengths, share: float) -> Callable[[Config], StepSize]:
    """Return a function from a layout to the step's batch in it; its micro-batches are planned as the trainer plans them.

    Only `parallel` and `actor.micro_batch_tokens` of the layouts may differ from `config`; what they share is planned once.
    """
    prompts = config.trainer.prompts_per_step
    taught = round(share * prompts)
    demonstration = max(2, round(lengths.prompt + lengths.demonstration))
    rows = [demonstration] * taught + lengths.rows((prompts - taught) * config.rollout.samples_per_prompt)
    tokens, squares = sum(rows), sum(row * row for row in rows)
    parity = attention_parity(
        shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, max(1, shape.experts_per_token)
    )

    @cache
    def planned(ranks: int, budget: int) -> list[list[list[int]]]:
        return plan_micro_batches(rows, ranks, budget, attention_parity=parity)

    @cache
    def padded(ranks: int, budget: int, row_multiple: int, batch_multiple: int) -> list[list[int]]:
        """Return the positions of each rank's micro-batches, padding included (`batch.packing.places`)."""
        slots = [row + -row % row_multiple for row in rows]
        filled = [[sum(slots[i] for i in part) for part in parts] for parts in planned(ranks, budget)]
        return [[positions + -positions % batch_multiple for positions in parts] for parts in filled]

    updates, epochs = optimizer_steps(config), config.trainer.epochs_per_batch

    def batch(layout: Config) -> StepSize:
        parallel, budget = layout.parallel, layout.actor.micro_batch_tokens
        count = len(planned(parallel.data, budget)[0])
        every = padded(parallel.data, budget, parallel.row_multiple, parallel.batch_multiple)
        if parallel.virtual_pipeline == 1:
            positions = max(map(sum, every)) / count
        else:  # of an interleaved schedule all have the length of the longest (actor/microbatch.py)
            count += -count % parallel.pipeline
            positions = max(map(max, every))
        multiple = updates * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        trained = epochs * count + -epochs * count % multiple  # every update has as many micro-batches as the others
        return StepSize(len(rows), tokens / len(rows), trained, positions * epochs * count / trained, squares / tokens, updates)

    return batch
