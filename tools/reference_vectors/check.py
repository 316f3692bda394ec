"""Running every case of a vector file against this project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import losses, others
from .cases import Case, Checker, read

CHECKERS: dict[str, Checker] = {
    "compute_sft_pure_loss": losses.check_sft,
    "compute_sft_token_loss": losses.check_sft,
    "compute_policy_loss": losses.check_policy,
    "compute_token_on_off_policy_loss": losses.check_on_off,
    "compute_token_on_off_policy_mask_loss": losses.check_on_off,
    "compute_token_on_off_policy_loss_weight": losses.check_on_off,
    "compute_token_on_off_policy_srft_loss": losses.check_on_off,
    "micro_batch_policy_loss": losses.check_micro_batch,
    "optimizer_step_gradient": losses.check_optimizer_step,
    "compute_grpo_outcome_advantage": others.check_advantage,
    "compute_grpo_outcome_advantage_split": others.check_advantage,
    "compute_grpo_balance_outcome_advantage": others.check_advantage,
    "compute_reinforce_outcome_advantage": others.check_advantage,
    "compute_reinforce_plus_plus_outcome_advantage": others.check_reinforce_pp,
    "compute_gae_advantage_return": others.check_gae,
    "kl_penalty": others.check_kl,
    "compute_value_loss": others.check_value_loss,
    "f(p)=p/(p+gamma)": others.check_shaping,
    "entropy_weights": others.check_entropy_weights,
    "select_on_off_ada_balance": others.check_gate,
    "get_eos_mask": others.check_eos_mask,
    "logprobs_from_logits_naive+entropy_from_logits": others.check_logits,
    "generate_off_sequences": others.check_demonstration_row,
    "ResumableRandomSampler": others.check_sampler,
}


_STAND_FOR_OTHERS = {
    *("raises", "per_micro_batch", "prefix_mask", "attention_mask", "position_ids", "epoch1", "epoch2"),
    *("df_dp", "dloss_dlogp_over_minusA"),
}
"""Keys of ``expected`` whose content is compared under other names."""


@dataclass
class CaseOutcome:
    """What checking all cases of one function gave."""

    function: str
    cases: int = 0
    quantities: int = 0
    misses: list[str] = field(default_factory=list)
    treated: dict[str, list[str]] = field(default_factory=dict)
    """Reason → the cases whose numbers differ on purpose."""


def check_file(path: Path) -> list[CaseOutcome]:
    """Check every case, by function, in the order of the file.

    Raises:
        DataError: not a file of test vectors.
    """
    outcomes: dict[str, CaseOutcome] = {}
    for case in read(path):
        _check(case, outcomes.setdefault(case.function, CaseOutcome(case.function)))
    return list(outcomes.values())


def _check(case: Case, outcome: CaseOutcome) -> None:
    outcome.cases += 1
    checker = CHECKERS.get(case.function)
    if checker is None:
        outcome.misses.append(f"{case.name}: no check for {case.function}")
        return
    for miss in _comparisons(case, checker, outcome):
        outcome.misses.append(f"{case.name}: {miss}")


def _comparisons(case: Case, checker: Checker, outcome: CaseOutcome) -> Iterator[str]:
    compared = set()
    try:
        for comparison in checker(case):
            outcome.quantities += 1
            compared.add(comparison.quantity)
            if comparison.treated:
                outcome.treated.setdefault(comparison.treated, []).append(f"{case.name} ({comparison.quantity})")
            if comparison.misses:
                yield comparison.misses
        if forgotten := case.expected.keys() - compared - _STAND_FOR_OTHERS:
            yield f"expected {', '.join(sorted(forgotten))}: nothing of ours was compared with it"
    except Exception as error:  # a case this project cannot even compute is a miss, and the others are still checked
        yield f"{type(error).__name__}: {error}"
