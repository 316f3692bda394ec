"""What each optimizer step of a batch trains, packed for this rank, and log-probabilities under policies that stay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_hpt.actor.microbatch import MicroBatch, pack_all
from megatron_hpt.actor.reference_model import forward_logprobs, penalised
from megatron_hpt.actor.state import Actor
from megatron_hpt.batch.packing import plan_micro_batches, row_cost
from megatron_hpt.batch.rows import Row, Source
from megatron_hpt.batch.updates import order, split
from megatron_hpt.objective.tokens import Denominators, count

PROBE_ROWS = 8
"""Rollouts whose log-probabilities are compared with the engine's in every step, trained or not."""


@dataclass(frozen=True)
class FixedLogprobs:
    """Log-probabilities of a micro-batch's response tokens under policies that no update of the batch changes.

    Float [positions] each; None where there is no such policy, and on stages before the last.
    """

    reference: Tensor | None = None
    """Under the reference model of the KL penalty."""
    old: Tensor | None = None
    """Under the trainer's weights when the batch arrived, where these are π_θold and will be changed between updates."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step trains, as this rank computes it."""

    batches: Sequence[MicroBatch]
    fixed: Sequence[FixedLogprobs]
    """Of each micro-batch."""
    denominators: Denominators
    """Counts over all rows of the update, on all ranks."""


def prepare(actor: Actor, rows: Sequence[Row], updates: int, step: int) -> list[Update]:
    """Cut a batch into updates and compute what they need of policies that stay as they are; collective.

    Rows that are only measured belong to the update that the first pass begins with (`batch.updates.order`): from then on the
    policy is no longer the one that sampled.

    Args:
        updates: how many are wanted; there are fewer where fewer prompts train anything.
        step: number of the batch.
    """
    config, kl = actor.config, actor.algorithm.kl
    in_reward = kl is not None and kl.in_reward
    needed, spare = _needed_and_spare(rows, in_reward)
    parts = split(
        [row.group for row in needed],
        [row_cost(len(row.tokens) - 1, actor.attention_parity) for row in needed],
        [row.role if row.weight != 0 else None for row in needed],
        updates,
    )
    first = order(len(parts), config.trainer.seed, step, 0)[0]
    rows = [*needed, *_probes([needed[index] for index in parts[first]], spare)]
    probes = range(len(needed), len(rows))
    plans = [_plan(rows, part, probes if number == first else (), actor) for number, part in enumerate(parts)]
    plan = [indices for plan in plans for indices in plan]
    batches, references, old = _packed(rows, plan, actor), [], []
    if actor.reference is not None:
        references = forward_logprobs(actor.reference, actor, batches)
    if in_reward:
        rows = penalised(rows, plan, references, actor)
        batches = _packed(rows, plan, actor)  # with the advantages estimated again
    if config.algorithm.old_policy == "trainer" and len(parts) * config.trainer.epochs_per_batch > 1:
        old = forward_logprobs(actor.chunks, actor, batches)
    fixed = [FixedLogprobs(*(each[i] if each else None for each in (references, old))) for i in range(len(batches))]
    ends = itertools.accumulate(map(len, plans))
    places = [slice(end - len(own), end) for own, end in zip(plans, ends, strict=True)]
    counts = [_denominators([rows[index] for index in part], actor) for part in parts]
    return [Update(batches[place], fixed[place], counted) for place, counted in zip(places, counts, strict=True)]


def selected_rows(rows: Sequence[Row], in_reward: bool = False) -> list[Row]:
    """Choose the rows that a step of one update computes: trained rows, then untrained rollouts up to `PROBE_ROWS` of them.

    Args:
        in_reward: a KL penalty enters the rewards, so rows that do not train but are compared with those that do are chosen
            too: their rewards change as well.
    """
    needed, spare = _needed_and_spare(rows, in_reward)
    return needed + _probes(needed, spare)


def _needed_and_spare(rows: Sequence[Row], in_reward: bool) -> tuple[list[Row], list[Row]]:
    """Return the rows that have to be computed, and the other rollouts, which can be measured."""
    needs = [row.weight != 0 or (in_reward and row.is_estimated) for row in rows]
    needed = [row for row, is_needed in zip(rows, needs, strict=True) if is_needed]
    others = (row for row, is_needed in zip(rows, needs, strict=True) if not is_needed)
    return needed, [row for row in others if row.source is Source.ROLLOUT]


def _probes(computed: Sequence[Row], spare: Sequence[Row]) -> list[Row]:
    """Return as many spare rollouts as are missing at `PROBE_ROWS` of them."""
    rollouts = sum(row.source is Source.ROLLOUT for row in computed)
    return list(spare[: max(0, PROBE_ROWS - rollouts)])


def _plan(rows: Sequence[Row], trained: Sequence[int], probes: Sequence[int], actor: Actor) -> list[list[int]]:
    """Plan this data parallel rank's micro-batches of an update, as indices of rows.

    Rows that are only measured (`probes`) get micro-batches of their own. Which of them there are may depend on when rollouts
    were cancelled, and the order of sums over trained rows must not depend on it.
    """
    parallel = actor.config.parallel
    return [
        [part[index] for index in indices]
        for part in ([part for part in (trained, probes) if part] or [[]])
        for indices in plan_micro_batches(
            [len(rows[index].tokens) - 1 for index in part],
            actor.ranks.data_size,
            actor.config.actor.micro_batch_tokens,
            attention_parity=actor.attention_parity,
            count_multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        )[actor.ranks.data]
    ]


def _packed(rows: Sequence[Row], plan: Sequence[Sequence[int]], actor: Actor) -> list[MicroBatch]:
    return pack_all(rows, plan, actor.platform.device, actor.layout)


def _denominators(rows: Sequence[Row], actor: Actor) -> Denominators:
    return count(((row.role, row.group, row.response_length, row.weight) for row in rows), actor.ranks.data_size)
