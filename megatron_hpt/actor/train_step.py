"""Train one batch: for each of its updates forward and backward through Megatron's schedules, an optimizer step, measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hpt.actor import guard
from megatron_hpt.actor.microbatch import MicroBatch
from megatron_hpt.actor.optimizer.optimizer import learning_rate
from megatron_hpt.actor.predictions import model_logprobs
from megatron_hpt.actor.state import Actor
from megatron_hpt.actor.updates import FixedLogprobs, Update, prepare
from megatron_hpt.batch.rows import Row
from megatron_hpt.batch.updates import order
from megatron_hpt.objective.estimator import Loss, part_names, unified_loss
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.tokens import Denominators, Tokens

_MISMATCH = ("k3", "measured", "logprob_gap")


@dataclass(frozen=True)
class UpdateOutcome:
    """How one update of a batch went; the same on every rank."""

    sums: dict[str, float]
    """Sums over all ranks by name: the loss, its parts, the mismatch."""
    denominators: Denominators
    verdict: guard.Verdict


def train_step(actor: Actor, rows: Sequence[Row], step: int) -> dict[str, float | str | None]:
    """Train one batch; called once a step, collective over all ranks, which must all give the same rows.

    A batch is `trainer.updates_per_batch` optimizer steps, `trainer.epochs_per_batch` times over. All of them have the same
    learning rate and entropy coefficient. One that must not be taken (see `guard`) leaves weights and optimizer as they are and
    says so in the metrics; the others go on, unless the whole batch is refused.

    Returns:
        Metrics, the same on every rank.
    """
    trainer = actor.config.trainer
    lr = learning_rate(actor.config.optimizer, step, trainer.steps)
    for group in actor.optimizer.param_groups:
        group["lr"] = lr
    updates = prepare(actor, rows, trainer.updates_per_batch, step)
    schedule, outcomes = list(_schedule(actor, updates, step)), []
    for update in schedule:
        sums = _forward_backward(actor, update)
        # From the second update on the gap to the engine is what has been learnt, too.
        k3 = None if outcomes else _mean(sums["k3"], sums["measured"])
        with actor.offload.optimizer():
            outcomes.append(UpdateOutcome(sums, update.denominators, guard.update(actor, update.denominators, k3)))
        if guard.ends_batch(actor, outcomes[-1].verdict):
            break
    metrics = _metrics(actor, outcomes, updates) | _taken_metrics(outcomes, len(schedule)) | {"train/lr": lr}
    bonus = actor.algorithm.entropy
    entropies = [o.sums["bonus_entropy"] for o in outcomes if not o.verdict.reason and o.denominators.of(bonus.roles).tokens]
    if entropies:
        actor.entropy_coefficient = bonus.next_coefficient(actor.entropy_coefficient, _mean(sum(entropies), len(entropies)))
    return metrics


def _schedule(actor: Actor, updates: Sequence[Update], step: int) -> Iterator[Update]:
    """Yield the updates of a batch as they are taken: every one once in each epoch."""
    for epoch in range(actor.config.trainer.epochs_per_batch):
        yield from (updates[index] for index in order(len(updates), actor.config.trainer.seed, step, epoch))


def accumulate(actor: Actor, rows: Sequence[Row]) -> tuple[dict[str, float], Denominators]:
    """Put the gradient of a whole batch into the model's gradient buffers, whatever the updates of a run; collective.

    Returns:
        Sums over all ranks by name (the loss, its parts, the mismatch), and the counts by which the loss was divided.
    """
    (update,) = prepare(actor, rows, updates=1, step=0)
    return _forward_backward(actor, update), update.denominators


def _metrics(actor: Actor, outcomes: Sequence[UpdateOutcome], updates: Sequence[Update]) -> dict[str, float | None]:
    """Means over the updates that were tried of what is a mean over tokens; counts of the batch, each row once.

    The mismatch is that of the first update, before which the weights were the engine's.
    """

    def mean(name: str) -> float:
        return sum(outcome.sums[name] for outcome in outcomes) / len(outcomes)

    def share(name: str) -> float:
        rollout_tokens = sum(outcome.denominators.of([Role.ROLLOUT]).tokens for outcome in outcomes)
        return _mean(sum(outcome.sums[name] for outcome in outcomes), rollout_tokens) or 0.0

    first = outcomes[0].sums
    losses = {f"train/{name}": mean(name) for name in first if name.startswith("loss")}
    kl = {"train/kl": mean("kl")} if actor.algorithm.kl is not None else {}
    return {
        **losses,
        **kl,
        "train/entropy": mean("entropy"),
        "train/entropy_coefficient": actor.entropy_coefficient,
        "train/masked_share": share("masked"),
        "train/tokens": sum(update.denominators.tokens for update in updates),
        "train/rows": sum(update.denominators.rows for update in updates),
        "mismatch/k3_kl": _mean(first["k3"], first["measured"]),
        "mismatch/logprob_gap": _mean(first["logprob_gap"], first["measured"]),
        "mismatch/tokens": first["measured"],
        "mismatch/dropped_share": share("dropped"),
        "time/objective_s": actor.timer.collect(actor.platform.device),
    }


def _taken_metrics(outcomes: Sequence[UpdateOutcome], planned: int) -> dict[str, float | str | None]:
    """The largest gradient norm of the batch, how many of the planned updates were taken, and why the first was not."""
    norms = [outcome.verdict.grad_norm for outcome in outcomes]
    reasons = [(number, outcome.verdict.reason) for number, outcome in enumerate(outcomes, 1) if outcome.verdict.reason]
    taken = len(outcomes) - len(reasons)
    reason = None
    if reasons:
        number, reason = reasons[0]
        reason = f"update {number} of {planned}: {reason}" if planned > 1 and reason != guard.EMPTY else reason
    return {
        "train/grad_norm": max(norms, key=lambda norm: (not math.isfinite(norm), norm)),
        "train/updates": taken,
        "train/skipped": planned - taken,
        "train/skip_reason": reason,
    }


def _mean(total: float, number: float) -> float | None:
    return total / number if number else None


def _forward_backward(actor: Actor, update: Update) -> dict[str, float]:
    """Put the gradients of an update into the buffers, and return sums over all ranks by name; collective."""
    for wrapped in actor.wrapped:
        wrapped.zero_grad_buffer()
    actor.optimizer.zero_grad()
    parts = get_forward_backward_func()(
        forward_step_func=lambda data, model: _forward(actor, update.denominators, next(data), model),
        data_iterator=[zip(update.batches, update.fixed, strict=True) for _ in actor.wrapped],
        model=actor.wrapped,
        num_microbatches=len(update.batches),
        # It is read where all micro-batches are of one length; elsewhere stages exchange shapes.
        seq_length=update.batches[0].length,
        micro_batch_size=1,
        forward_only=False,
    )
    names = (*part_names(actor.algorithm), *_MISMATCH)
    # All other ranks add zeros, so that each loss is counted once.
    total = torch.zeros(len(names), dtype=torch.float64, device=actor.platform.device)
    if actor.ranks.reports:
        total += torch.stack([part["sums"] for part in parts]).sum(dim=0)
    dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def _forward(actor: Actor, denominators: Denominators, data: tuple[MicroBatch, FixedLogprobs], model: DistributedDataParallel):
    """Do Megatron's forward step: return this chunk's output, and the loss as a function of the last chunk's."""
    batch, fixed = data
    output = model(batch.tokens, batch.positions, None, packed_seq_params=batch.packing)

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        predictions = model_logprobs(hidden, batch, model.module, actor)
        value, sums = _loss(actor, denominators, batch, fixed, *predictions)
        return value, torch.ones((), dtype=torch.int, device=value.device), {"sums": sums}

    return output, loss


def _loss(
    actor: Actor, denominators: Denominators, batch: MicroBatch, fixed: FixedLogprobs, logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one micro-batch, and its sums in the order of `part_names` and `_MISMATCH`, float64.

    Args:
        logprobs: log π_θ of the response tokens, as `entropy` float [positions].
    """
    with actor.timer.forward():
        loss = _objective(actor, denominators, batch, fixed, logprobs, entropy)
    actor.timer.watch_backward(loss.total, (logprobs, entropy))
    gap = torch.where(batch.measured, logprobs.detach() - batch.behaviour_logprobs, 0.0).double()
    k3 = (torch.expm1(gap) - gap).sum()  # http://joschu.net/blog/kl-approx.html: KL(engine ‖ trainer), never negative
    sums = (*loss.parts.values(), k3, batch.measured.sum(), gap.abs().sum())
    return loss.total, torch.stack([part.double() for part in sums])


def _objective(
    actor: Actor, denominators: Denominators, batch: MicroBatch, fixed: FixedLogprobs, logprobs: Tensor, entropy: Tensor
) -> Loss:
    old = fixed.old
    if old is None and actor.config.algorithm.old_policy == "trainer":
        old = logprobs.detach()  # the batch's only update: the weights are still those that it found
    tokens = Tokens(
        logprobs=logprobs,
        entropy=entropy,
        behaviour_logprobs=batch.behaviour_logprobs,
        advantages=batch.advantages,
        weights=batch.weights,
        row_lengths=batch.row_lengths,
        rows=batch.rows,
        roles=batch.roles,
        reference_logprobs=fixed.reference,
        old_logprobs=old,
    )
    return unified_loss(actor.algorithm, tokens, denominators, actor.entropy_coefficient)
