"""Decide whether an update is taken: what would damage the policy is skipped and counted, and the trainer keeps the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_hpt.actor.state import Actor
from megatron_hpt.config import Config
from megatron_hpt.errors import HptError
from megatron_hpt.objective.tokens import Denominators

EMPTY = "nothing to train"
"""Reason of a batch without a trained token. It neither counts towards `stop_after_skipped` nor ends a row of skipped steps."""

# Bounds of mismatch/k3_kl, the KL between engine and trainer on a batch's rollouts, in nats a token.
ROUNDING = {"float32": 0.01, "bfloat16": 0.1}
"""By `model.dtype`, the largest that rounding explains at temperature 1; usual are 1e-4 and 1e-3 to 1e-2."""
COARSE = 0.3
"""The largest where rounding changes more than digits: under FP8, or where it decides which experts a token goes through."""
MOST = 1.0
"""The largest at any dtype and temperature: above it, the engine's tokens are at most half as likely under the trainer."""


@dataclass(frozen=True)
class Verdict:
    """Whether an update was taken, and why not; the same on every rank."""

    grad_norm: float
    """Before clipping."""
    reason: str | None
    """Why it was not; None where it was."""
    is_mismatch: bool
    """The engine disagrees with the trainer, so no other update of the batch may be taken either."""


def update(actor: Actor, denominators: Denominators, k3: float | None) -> Verdict:
    """Clip the gradient and step the optimizer, or skip the update; collective.

    Args:
        k3: KL between engine and trainer on the rollouts of a batch's first update; None without any, and for later ones.
    """
    with actor.platform.building():
        actor.optimizer.prepare_grads()
        norm = float(actor.optimizer.get_grad_norm())
        mismatch = _mismatch(actor, k3)
        reason = mismatch or _reason(actor, denominators, norm)
        if reason is None:
            actor.optimizer.step()
    if reason is None:
        actor.skipped_in_a_row = 0
    elif reason != EMPTY:
        actor.skipped_in_a_row += 1
    return Verdict(norm, reason, mismatch is not None)


def ends_batch(actor: Actor, verdict: Verdict) -> bool:
    """Return whether the batch's further updates are left out, given the verdict on the last one.

    They are where the engine disagrees, where there is nothing to train, and where `check` is going to stop the run.
    """
    hopeless = actor.skipped_in_a_row >= actor.config.optimizer.stop_after_skipped
    return verdict.is_mismatch or verdict.reason == EMPTY or hopeless


def _mismatch(actor: Actor, k3: float | None) -> str | None:
    """Return why no update of a batch with this k3 may be taken, or None."""
    stop_above = actor.config.algorithm.mismatch.stop_above
    # Written so that a k3 that is not a number counts as above the bound.
    if stop_above is not None and k3 is not None and not k3 <= stop_above:
        return f"mismatch/k3_kl {k3:.4g} is above algorithm.mismatch.stop_above={stop_above:g}"
    return None


def _reason(actor: Actor, denominators: Denominators, norm: float) -> str | None:
    """Return why the update must not be taken, or None if it may; the same on every rank, since all arguments are."""
    limit = actor.config.optimizer.skip_above
    if denominators.tokens == 0:
        return EMPTY
    if not math.isfinite(norm):
        return f"the gradient norm is {norm}"
    if limit is not None and norm > limit:
        return f"the gradient norm {norm:.4g} is above optimizer.skip_above={limit:g}"
    return None


def first_bound(config: Config, is_routed: bool, is_fp8: bool) -> float:
    """Return the largest k3 that the first batch may have.

    k3 is half the variance of a log-probability's error where that error is small, and a temperature T < 1 multiplies the
    error by 1/T. In float32 the error is far below the bound at any temperature, so T does not widen its bound.
    """
    base = COARSE if is_fp8 or (is_routed and config.model.dtype != "float32") else ROUNDING[config.model.dtype]
    temperature = 1.0 if config.model.dtype == "float32" else min(1.0, config.rollout.temperature)
    return min(MOST, base / temperature**2)


def check_first(config: Config, is_routed: bool, is_fp8: bool, step: int, k3: float) -> None:
    """Stop a run whose engine samples from another distribution than the trainer computes; called for the first batch only.

    Raises:
        HptError: the mismatch is larger than rounding explains, and the recipe has no bound of its own.
    """
    bound = first_bound(config, is_routed, is_fp8)
    if config.algorithm.mismatch.stop_above is None and not k3 <= bound:
        raise HptError(
            f"step {step}: mismatch/k3_kl {k3:.3g} of the first batch is above {bound:.3g}, more than rounding in "
            f"{config.model.dtype} explains: the engine does not sample from what the trainer computes. Another model, other "
            "overrides or weights (rollout.urls, rollout.model), or another temperature? Where it is meant to be so, "
            "algorithm.mismatch.stop_above sets the bound"
        )


def check(actor: Actor, step: int, reason: str | None) -> None:
    """Stop a run whose updates are no longer taken; called after a batch with a skipped one, when the batch has been kept.

    Raises:
        HptError: as many in a row as `optimizer.stop_after_skipped`.
    """
    if actor.skipped_in_a_row >= actor.config.optimizer.stop_after_skipped:
        raise HptError(
            f"step {step}: {reason}; {actor.skipped_in_a_row} steps in a row were not taken "
            "(optimizer.stop_after_skipped), so the run stops. Their batches are kept in skipped/"
        )
