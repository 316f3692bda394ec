"""The gate: for each prompt, its own success decides what it learns from (arXiv 2509.04419, eq. 10).

A gate is a pure function of what is known of a prompt; what it remembers (hysteresis) and the step (phases, global
mixtures) are given to it. Every decision is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from typing import Protocol

from megatron_hpt.objective.roles import Role

BOTH_ROLES = frozenset({Role.ROLLOUT, Role.DEMONSTRATION})


class Choice(StrEnum):
    """What a prompt learns from in this step."""

    ROLLOUTS = "rollouts"
    DEMONSTRATION = "demonstration"
    OFF_POLICY = "off_policy"
    """Its demonstration, by off-policy RL."""
    BOTH = "both"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Situation:
    """What is known of a prompt."""

    prompt_id: str
    rewards: Sequence[float | None]
    """Of its rollouts; None where ungraded."""
    has_demonstration: bool
    step: int = 0
    data_source: str = ""
    previous: Choice | None = None
    """What was decided when the prompt was last seen; None the first time."""
    cancelled: int = 0
    """Further rollouts that were asked for and cancelled, because they could not change the decision any more."""

    @property
    def asked(self) -> int:
        """n: rollouts that were asked for."""
        return len(self.rewards) + self.cancelled

    @property
    def solved(self) -> int:
        """Correct answers: a reward of exactly 1, as in the reference."""
        return sum(reward == 1.0 for reward in self.rewards)

    @property
    def graded(self) -> int:
        """Answers that have a reward."""
        return sum(reward is not None for reward in self.rewards)

    @property
    def share(self) -> float:
        """Solved of graded; 0 without any."""
        return self.solved / self.graded if self.graded else 0.0


@dataclass(frozen=True)
class Decision:
    """One prompt's outcome, as it is recorded."""

    prompt_id: str
    data_source: str
    solved: int
    graded: int
    choice: Choice
    rollout_weight: float
    """α: factor of its rollouts in the loss."""
    demonstration_weight: float
    """β: factor of its demonstration."""
    has_demonstration: bool
    missing_demonstration: bool = False
    """The gate asked for a demonstration that the data does not have."""
    cancelled: int = 0
    """Rollouts that were asked for and cancelled."""

    @property
    def outcome(self) -> tuple[Choice, float, float, bool]:
        """What of it changes what is trained."""
        return self.choice, self.rollout_weight, self.demonstration_weight, self.missing_demonstration


class Gate(Protocol):
    """A rule from a situation to a decision."""

    @property
    def formula(self) -> str:
        """The rule, for people."""

    needs_demonstrations: bool
    roles: frozenset[Role]
    """The rows that it may choose; each needs a term."""
    refills: bool
    """Prompts that were skipped are replaced by others (dynamic sampling)."""

    def samples(self, wanted: int, has_demonstration: bool, step: int) -> int:
        """How many rollouts a prompt needs, of the recipe's n; 0: nothing is generated."""

    def __call__(self, situation: Situation) -> Decision:
        """Decide for one prompt."""

    def decided(self, so_far: Situation, wanted: int) -> bool:
        """Whether the rollouts will not train, and the decision is the same whatever those of `wanted` bring that are missing
        so far, also if they are cancelled."""


def decides_early(gate: Gate, unsampled: Situation, wanted: int) -> bool:
    """Whether a prompt may be decided before all of its rollouts are graded."""
    return any(
        gate.decided(replace(unsampled, rewards=[1.0] * solved + [0.0] * (wanted - 1 - solved)), wanted)
        for solved in range(wanted)
    )


@dataclass(frozen=True)
class _Rule:
    """What most gates share: n rollouts a prompt, no refills, no early decision."""

    refills = False

    def samples(self, wanted: int, has_demonstration: bool, step: int) -> int:
        """The recipe's n."""
        return wanted

    def decided(self, so_far: Situation, wanted: int) -> bool:
        """Every rollout counts."""
        return False


def _decide(situation: Situation, choice: Choice, rollouts: float = 0.0, demonstration: float = 0.0) -> Decision:
    return Decision(
        situation.prompt_id,
        situation.data_source,
        situation.solved,
        situation.graded,
        choice,
        rollouts,
        demonstration,
        situation.has_demonstration,
        cancelled=situation.cancelled,
    )


def _rollouts(situation: Situation) -> Decision:
    return _decide(situation, Choice.ROLLOUTS, rollouts=1.0)


def _skipped(situation: Situation) -> Decision:
    return _decide(situation, Choice.SKIPPED)


def _missing(situation: Situation, instead: Choice, weight: float = 1.0) -> Decision:
    """The gate wants a demonstration that is not there: rollouts with the weight they have, or nothing."""
    uses_rollouts = instead is Choice.ROLLOUTS and situation.graded and weight
    decision = _decide(situation, Choice.ROLLOUTS, rollouts=weight) if uses_rollouts else _skipped(situation)
    return replace(decision, missing_demonstration=True)


Threshold = int | float


@dataclass(frozen=True)
class Thresholds:
    """At or below `demonstration` the demonstration is imitated; at or below `off_policy` it trains by off-policy RL.

    A whole number is a count of the n rollouts (0 and 2 of 8 in the reference), a fraction a share of them. Ungraded
    answers and cancelled ones are left out: a count shrinks in proportion.
    """

    demonstration: Threshold = 0
    off_policy: Threshold | None = None
    strict: bool = False

    def choose(self, situation: Situation, hysteresis: Threshold = 0) -> Choice:
        """The side that a prompt is on; a threshold it was last at or below is higher by `hysteresis`."""
        taught, in_band = (situation.previous is choice for choice in (Choice.DEMONSTRATION, Choice.OFF_POLICY))
        if self._reaches(situation, self.demonstration, hysteresis if taught else 0):
            return Choice.DEMONSTRATION
        if self.off_policy is not None and self._reaches(situation, self.off_policy, hysteresis if taught or in_band else 0):
            return Choice.OFF_POLICY
        return Choice.ROLLOUTS

    def _reaches(self, situation: Situation, threshold: Threshold, raised_by: Threshold) -> bool:
        """P ≤ γ (strict: P < γ), in exact arithmetic; a negative threshold is never reached."""
        if threshold < 0:
            return False
        at, allowed = self._scaled(situation, threshold, raised_by)
        return at < allowed if self.strict else at <= allowed

    @staticmethod
    def _scaled(situation: Situation, threshold: Threshold, raised_by: Threshold) -> tuple[Fraction, Fraction]:
        n = situation.asked
        # 0.7 means 7/10: with its binary value, 7 of 10 would be below it.
        counts = [Fraction(t).limit_denominator(10**6) * (1 if isinstance(t, int) else n) for t in (threshold, raised_by)]
        return Fraction(situation.solved * n), sum(counts) * situation.graded

    @property
    def formula(self) -> str:
        """For people."""
        sign, band = "<" if self.strict else "≤", ""
        if self.off_policy is not None:
            band = f", off-policy RL on it if P {sign} {_shown(self.off_policy)}"
        return f"demonstration if P {sign} {_shown(self.demonstration)}{band}, else rollouts"


def _shown(threshold: Threshold) -> str:
    return f"{threshold} of n" if isinstance(threshold, int) else f"{threshold:g}"


@dataclass(frozen=True)
class Switch(_Rule):
    """HPT's hard switch: solved ≤ threshold → demonstration, else rollouts.

    With hysteresis a prompt that was last taught by its demonstration leaves it only when it is solved that much more
    often. A prompt without a single graded answer is skipped, because nothing is known about it.
    """

    thresholds: Thresholds = Thresholds()
    without_demonstration: Choice = Choice.ROLLOUTS
    by_source: Mapping[str, Thresholds] = field(default_factory=dict)
    hysteresis: Threshold = 0
    needs_demonstrations = True

    @property
    def roles(self) -> frozenset[Role]:
        """The band only where some thresholds have one."""
        banded = any(t.off_policy is not None for t in (self.thresholds, *self.by_source.values()))
        return BOTH_ROLES | ({Role.OFF_POLICY} if banded else set())

    @property
    def formula(self) -> str:
        """For people."""
        others = "".join(f"; {source}: {t.formula}" for source, t in self.by_source.items())
        sticky = f"; {_shown(self.hysteresis)} more to leave the demonstration" if self.hysteresis else ""
        return f"{self.thresholds.formula}{sticky}{others}"

    def __call__(self, situation: Situation) -> Decision:
        """Decide."""
        if situation.graded == 0:
            return _skipped(situation)
        thresholds = self.by_source.get(situation.data_source, self.thresholds)
        choice = thresholds.choose(situation, self.hysteresis)
        if choice is Choice.ROLLOUTS:
            return _rollouts(situation)
        if not situation.has_demonstration:
            return _missing(situation, self.without_demonstration)
        return _decide(situation, choice, demonstration=1.0)

    def decided(self, so_far: Situation, wanted: int) -> bool:
        """Whether every number of further successes gives one decision, against the rollouts, and cancelling does too.

        Answers that will be ungraded need no look of their own: with s solved, f failed and a threshold of k of n,
        P ≤ γ is s·(n - k) ≤ k·f, and both sides only grow with s and f.
        """
        known, missing = list(so_far.rewards), wanted - len(so_far.rewards)
        endings = [
            replace(so_far, rewards=known + [1.0] * more + [0.0] * (missing - more), cancelled=0) for more in range(missing + 1)
        ]
        decision = self(replace(so_far, cancelled=missing))
        return not decision.rollout_weight and all(self(ending).outcome == decision.outcome for ending in endings)


@dataclass(frozen=True)
class Soft(_Rule):
    """Both losses live on one prompt: α = f(P) on its rollouts, β = g(P) on its demonstration (eq. 10 before the switch)."""

    rollouts: Callable[[float], float]
    demonstration: Callable[[float], float]
    without_demonstration: Choice = Choice.ROLLOUTS
    formula: str = "α = f(P) on rollouts, β = g(P) on the demonstration"
    needs_demonstrations = True
    roles = BOTH_ROLES

    def __call__(self, situation: Situation) -> Decision:
        """Weigh."""
        if situation.graded == 0:
            return _skipped(situation)
        alpha, beta = self.rollouts(situation.share), self.demonstration(situation.share)
        if beta and not situation.has_demonstration:
            return _missing(situation, self.without_demonstration, alpha)
        return _decide(situation, _side(alpha, beta), alpha, beta)


def _side(alpha: float, beta: float) -> Choice:
    if alpha and beta:
        return Choice.BOTH
    return Choice.ROLLOUTS if alpha else Choice.DEMONSTRATION if beta else Choice.SKIPPED


@dataclass(frozen=True)
class AlwaysRollouts(_Rule):
    """Pure RL."""

    formula: str = "rollouts"
    needs_demonstrations = False
    roles = frozenset({Role.ROLLOUT})

    def __call__(self, situation: Situation) -> Decision:
        """Rollouts, if any is graded."""
        return _rollouts(situation) if situation.graded else _skipped(situation)


@dataclass(frozen=True)
class Informative(_Rule):
    """DAPO's dynamic sampling (arXiv 2503.14476, eq. 11): only prompts neither always nor never solved; others take
    the place of the rest."""

    formula: str = "rollouts if 0 < P < 1, else another prompt"
    needs_demonstrations = False
    roles = frozenset({Role.ROLLOUT})
    refills = True

    def __call__(self, situation: Situation) -> Decision:
        """Keep or skip."""
        return _rollouts(situation) if 0 < situation.solved < situation.graded else _skipped(situation)


@dataclass(frozen=True)
class AlwaysDemonstrations(_Rule):
    """Pure SFT; nothing is generated."""

    formula: str = "demonstration"
    needs_demonstrations = True
    roles = frozenset({Role.DEMONSTRATION})

    def samples(self, wanted: int, has_demonstration: bool, step: int) -> int:
        """None."""
        return 0

    def __call__(self, situation: Situation) -> Decision:
        """The demonstration, if there is one."""
        if not situation.has_demonstration:
            return _missing(situation, Choice.SKIPPED)
        return _decide(situation, Choice.DEMONSTRATION, demonstration=1.0)


@dataclass(frozen=True)
class Union(_Rule):
    """Every group is its rollouts and one demonstration (LUFFY, SRFT): n - 1 rollouts make room for it.

    Rollouts that are all ungraded leave the demonstration; a prompt without one has n rollouts.
    """

    without_demonstration: Choice = Choice.ROLLOUTS
    formula: str = "n-1 rollouts and the demonstration"
    needs_demonstrations = True
    roles = BOTH_ROLES

    def samples(self, wanted: int, has_demonstration: bool, step: int) -> int:
        """One less than the recipe's n where there is a demonstration."""
        return wanted - 1 if has_demonstration else wanted

    def __call__(self, situation: Situation) -> Decision:
        """Both."""
        if not situation.has_demonstration:
            return _missing(situation, self.without_demonstration)
        return _decide(situation, _side(float(situation.graded > 0), 1.0), float(situation.graded > 0), 1.0)


@dataclass(frozen=True)
class Mixture(_Rule):
    """A global mixture: the same weights for every prompt, moving from demonstrations to rollouts by step
    (μ of CHORD, arXiv 2508.11408)."""

    start: float
    end: float
    steps: int
    without_demonstration: Choice = Choice.ROLLOUTS
    needs_demonstrations = True
    roles = BOTH_ROLES

    @property
    def formula(self) -> str:
        """For people."""
        return f"1-μ on rollouts, μ on the demonstration, μ: {self.start:g} → {self.end:g} in {self.steps} steps"

    def weight(self, step: int) -> float:
        """μ of a step."""
        done = min(1.0, step / self.steps)
        return self.start + (self.end - self.start) * done

    def __call__(self, situation: Situation) -> Decision:
        """Both."""
        mu = self.weight(situation.step)
        if not situation.has_demonstration:
            return _missing(situation, self.without_demonstration, 1 - mu)
        alpha = (1 - mu) * (situation.graded > 0)
        return _decide(situation, _side(alpha, mu), alpha, mu)


@dataclass(frozen=True)
class Phases(_Rule):
    """One gate until a step, another from there on (SFT → GRPO)."""

    first: Gate
    then: Gate
    at: int

    @property
    def formula(self) -> str:
        """For people."""
        return f"{self.first.formula} before step {self.at}, then {self.then.formula}"

    @property
    def needs_demonstrations(self) -> bool:
        """Either phase does."""
        return self.first.needs_demonstrations or self.then.needs_demonstrations

    @property
    def roles(self) -> frozenset[Role]:
        """Of both phases."""
        return self.first.roles | self.then.roles

    def samples(self, wanted: int, has_demonstration: bool, step: int) -> int:
        """As the phase's gate."""
        return self._of(step).samples(wanted, has_demonstration, step)

    def __call__(self, situation: Situation) -> Decision:
        """As the phase's gate."""
        return self._of(situation.step)(situation)

    def decided(self, so_far: Situation, wanted: int) -> bool:
        """As the phase's gate."""
        return self._of(so_far.step).decided(so_far, wanted)

    def _of(self, step: int) -> Gate:
        return self.first if step < self.at else self.then
