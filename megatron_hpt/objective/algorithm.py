"""An algorithm as data: terms of mask · 1/π_ref · Â · ∇π, the gate that feeds them, and what is around the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_hpt.errors import ConfigError
from megatron_hpt.objective.advantage import Advantage, Estimate, One, Outcome
from megatron_hpt.objective.aggregation import Aggregation, TokenMean
from megatron_hpt.objective.correction import Correction, NoCorrection
from megatron_hpt.objective.gate import Gate
from megatron_hpt.objective.kl import EntropyBonus, KlPenalty
from megatron_hpt.objective.reference import Reference
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Identity, Shaping
from megatron_hpt.objective.stability import NoMask, Stability


@dataclass(frozen=True)
class Term:
    """One source of gradient: mask · 1/π_ref · Â · ∇π, and how its tokens are added up."""

    name: str
    """Its key in the metrics: train/loss_<name>."""
    roles: frozenset[Role]
    """The rows it applies to."""
    reference: Reference
    advantage: Advantage
    aggregation: Aggregation
    stability: Stability = field(default_factory=NoMask)
    shaping: Shaping = field(default_factory=Identity)
    correction: Correction = field(default_factory=NoCorrection)
    coefficient: float = 1.0
    counted: frozenset[Role] = frozenset()
    """The rows in its denominators; default: those it applies to."""

    def __post_init__(self) -> None:
        if not self.counted:
            object.__setattr__(self, "counted", self.roles)
        if not self.reference.shapes and not isinstance(self.shaping, Identity):
            raise ConfigError(f"term {self.name}: π_ref = {self.reference.symbol} leaves nothing to shape; use Identity")


@dataclass(frozen=True)
class Algorithm:
    """What every row contributes, and which prompt gives which rows."""

    terms: tuple[Term, ...]
    gate: Gate
    entropy: EntropyBonus = field(default_factory=EntropyBonus)
    entropy_aggregation: Aggregation = field(default_factory=TokenMean)
    kl: KlPenalty | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) != len(names):
            raise ConfigError(f"algorithm: terms need different names, given {', '.join(names)}")
        for role in Role:
            if len(self._estimating(role)) > 1:
                raise ConfigError(f"algorithm: more than one term estimates advantages of {role.name.lower()} rows")

    @property
    def needs_values(self) -> bool:
        """An advantage needs a critic."""
        return any(term.advantage.needs_values for term in self.terms)

    @property
    def grades_demonstrations(self) -> bool:
        """An advantage compares demonstrations by their own reward."""
        roles = (Role.DEMONSTRATION, Role.OFF_POLICY)
        return any(self._estimating(role) for role in roles)

    def needs_estimate(self, role: Role) -> bool:
        """Nothing can be learnt from a row of this role without an estimated advantage."""
        return all(not _is_one(term.advantage) for term in self.terms if role in term.roles)

    def advantage_of(self, role: Role) -> Advantage:
        """The estimator behind a role's column of advantages; Â = 1 where every term brings its own."""
        estimating = self._estimating(role)
        return estimating[0].advantage if estimating else One()

    def estimate(self, roles: Sequence[Role], outcomes: Sequence[Outcome]) -> list[Estimate]:
        """The column of advantages of a batch, by each row's role."""
        estimators = {role: self.advantage_of(role) for role in set(roles)}
        columns = {role: estimator.estimate(outcomes) for role, estimator in estimators.items()}
        return [columns[role][index] for index, role in enumerate(roles)]

    def _estimating(self, role: Role) -> list[Term]:
        return [term for term in self.terms if role in term.roles and not _is_one(term.advantage)]


def _is_one(advantage: Advantage) -> bool:
    return isinstance(getattr(advantage, "inner", advantage), One)
