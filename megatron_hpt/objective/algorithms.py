"""The table: every algorithm is a record of choices, not a branch.

A record is a function from the recipe's settings to an `Algorithm`, because some choices carry numbers. Trust regions
have the values they were published with as defaults; lengths, coefficients and thresholds come from the recipe.
To add one of your own, write such a function anywhere and name it in the recipe: ``algorithm.name=package.module:mine``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megatron_hpt.config import AlgorithmConfig, Config, Section
from megatron_hpt.errors import ConfigError, did_you_mean
from megatron_hpt.objective import advantage as a
from megatron_hpt.objective import correction as c
from megatron_hpt.objective import gates
from megatron_hpt.objective.advantage import Grouped
from megatron_hpt.objective.aggregation import (
    ConstantLength,
    PromptShare,
    ReferenceConstantWidth,
    ReferenceTokenMean,
    SequenceMean,
    SequenceSum,
    TokenMean,
)
from megatron_hpt.objective.algorithm import Algorithm, Term
from megatron_hpt.objective.gate import AlwaysDemonstrations, AlwaysRollouts, Informative, Mixture, Phases, Union
from megatron_hpt.objective.kl import ESTIMATORS, EntropyBonus, KlPenalty
from megatron_hpt.objective.reference import Current, Old, OldSequence, One
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Saturating, Uncertain
from megatron_hpt.objective.stability import CisMask, Clip
from megatron_hpt.settings.user_functions import import_function

ROLLOUT, DEMONSTRATION, OFF_POLICY = (frozenset({role}) for role in Role)
BOTH = ROLLOUT | DEMONSTRATION


@dataclass(frozen=True)
class Settings:
    """What a record may depend on."""

    algorithm: AlgorithmConfig
    length: int
    """The constant length, tokens."""
    steps: int
    """Steps of the run."""

    def clip(self, low: float, high: float, dual: float | None = None, name: str = "clip") -> Clip:
        """The recipe's trust region; where it sets none, the published one given here."""
        given = self.algorithm.clip
        return Clip(_or(given.low, low), _or(given.high, high), _or(given.dual, dual), name)


def _or(given: float | None, default: float | None) -> float | None:
    return default if given is None else given


Record = Callable[[Settings], Algorithm]


# --- the building blocks that several rows share -----------------------------------------------------------------------


def likelihood(s: Settings, roles: frozenset[Role] = DEMONSTRATION) -> Term:
    """SFT's term: token-mean negative log-likelihood of demonstrations."""
    return Term("demonstrations", roles, Current(), a.One(), TokenMean(), coefficient=s.algorithm.demonstration_coefficient)


def centred(s: Settings) -> Term:
    """HPT's rollouts: Dr. GRPO without clipping."""
    return Term("rollouts", ROLLOUT, Old(), a.GroupCentred(), ConstantLength(s.length))


def clipped_grpo(s: Settings) -> Term:
    """GRPO's rollouts."""
    return Term("rollouts", ROLLOUT, Old(), a.GroupStandardised(), SequenceMean(), s.clip(0.2, 0.2))


def off_policy(s: Settings, roles: frozenset[Role]) -> Term:
    """Off-policy RL on demonstrations next to HPT's rollouts: π_ref = 1, Â = R (the demonstration is alone in its group)."""
    return Term(
        "off_policy",
        roles,
        One(),
        a.Return(),
        ConstantLength(s.length),
        shaping=Saturating(s.algorithm.shaping_gamma),
        coefficient=s.algorithm.off_policy_coefficient,
    )


def balanced(s: Settings, *terms: Term) -> tuple[Term, ...]:
    """The two sides of a gate, weighed as algorithm.balance says."""
    if s.algorithm.balance == "components":
        return terms
    return tuple(replace(term, aggregation=PromptShare(term.aggregation)) for term in terms)


def band(s: Settings) -> tuple[Term, ...]:
    """The term of prompts between two thresholds, where the recipe's gate has them."""
    gate = s.algorithm.gate
    thresholds = [gate.off_policy_threshold, *(source.off_policy_threshold for source in gate.by_source.values())]
    return (off_policy(s, OFF_POLICY),) if any(t is not None for t in thresholds) else ()


# --- the table ---------------------------------------------------------------------------------------------------------


def sft(s: Settings) -> Algorithm:
    """Supervised fine-tuning: token-mean negative log-likelihood of the demonstrations."""
    return Algorithm((likelihood(s),), AlwaysDemonstrations())


def reinforce(s: Settings) -> Algorithm:
    """REINFORCE as in table 1 of arXiv 2509.04419: Â = ±1, the likelihood of whole sequences."""
    return Algorithm((Term("rollouts", ROLLOUT, Current(), a.Sign(), SequenceSum()),), AlwaysRollouts())


def rloo(s: Settings) -> Algorithm:
    """RLOO (arXiv 2402.14740): REINFORCE with the mean of a prompt's other rollouts as baseline."""
    return Algorithm((Term("rollouts", ROLLOUT, Current(), a.LeaveOneOut(), SequenceSum()),), AlwaysRollouts())


def reinforce_pp(s: Settings) -> Algorithm:
    """REINFORCE++ (arXiv 2501.03262): PPO's clip on discounted returns that are whitened over the batch."""
    advantage = a.BatchWhitened(s.algorithm.discount)
    return Algorithm((Term("rollouts", ROLLOUT, Old(), advantage, TokenMean(), s.clip(0.2, 0.2)),), AlwaysRollouts())


def ppo(s: Settings) -> Algorithm:
    """PPO (arXiv 1707.06347) with generalised advantages; dual clip by algorithm.clip.dual. Needs a critic's values."""
    advantage = a.GeneralisedAdvantage(s.algorithm.discount, s.algorithm.gae_lambda)
    return Algorithm((Term("rollouts", ROLLOUT, Old(), advantage, TokenMean(), s.clip(0.2, 0.2)),), AlwaysRollouts())


def grpo(s: Settings) -> Algorithm:
    """GRPO (arXiv 2402.03300): clipped ratio, standardised within the group, mean over each sequence."""
    return Algorithm((clipped_grpo(s),), AlwaysRollouts())


def dr_grpo(s: Settings) -> Algorithm:
    """Dr. GRPO (arXiv 2503.20783): centred only, constant length, clipped ratio."""
    return Algorithm((replace(centred(s), stability=s.clip(0.2, 0.2)),), AlwaysRollouts())


def dapo(s: Settings) -> Algorithm:
    """DAPO (arXiv 2503.14476): clip-higher, token mean, dynamic sampling; overlong handling by algorithm.overlong."""
    rollouts = Term("rollouts", ROLLOUT, Old(), a.GroupStandardised(), TokenMean(), s.clip(0.2, 0.28))
    return Algorithm((rollouts,), Informative())


def cispo(s: Settings) -> Algorithm:
    """CISPO (MiniMax-M1, arXiv 2506.13585): every token keeps its gradient, its importance weight is bounded above.

    The report gives no bound; the default is ScaleRL's, a weight of at most 5 (arXiv 2510.13786).
    """
    given = s.algorithm.clip
    mask = CisMask(_or(given.high, 4.0), given.low)
    return Algorithm((Term("rollouts", ROLLOUT, Old(), a.GroupStandardised(), TokenMean(), mask),), AlwaysRollouts())


def gspo(s: Settings) -> Algorithm:
    """GSPO (arXiv 2507.18071): the ratio and the clip of whole sequences."""
    mask = s.clip(3e-4, 4e-4, name="sequence clip")
    rollouts = Term("rollouts", ROLLOUT, OldSequence(), a.GroupStandardised(), SequenceMean(), mask)
    return Algorithm((rollouts,), AlwaysRollouts())


def luffy(s: Settings) -> Algorithm:
    """LUFFY (arXiv 2504.14945): n-1 rollouts and one shaped demonstration in every group, advantage over the union.

    Both parts share one denominator, the tokens of all of them.
    """
    advantage = a.GroupStandardised(union=True)
    rollouts = Term("rollouts", ROLLOUT, Old(), advantage, TokenMean(), s.clip(0.2, 0.2), counted=BOTH)
    shaped = Saturating(s.algorithm.shaping_gamma)
    coefficient = s.algorithm.off_policy_coefficient
    demonstrations = Term(
        "off_policy", DEMONSTRATION, One(), advantage, TokenMean(), shaping=shaped, coefficient=coefficient, counted=BOTH
    )
    return Algorithm((rollouts, demonstrations), Union(gates.without_demonstration(s.algorithm.gate)))


def srft(s: Settings) -> Algorithm:
    """SRFT (arXiv 2506.19767) in one stage: SFT weighted down and positive rollouts weighted up by the policy's entropy.

    Demonstrations are imitated (times e^-H) and also reinforced with π_ref = 1 against the union of the group; rollouts
    are Â = ±1, positive ones times e^+H. The signs are the paper's; its released code has e^+H on the SFT term.
    """
    imitate = replace(likelihood(s), advantage=a.EntropyScaled(a.One(), s.algorithm.srft.imitation, -1))
    rollout_advantage = a.EntropyScaled(a.Sign(), s.algorithm.srft.reinforcement, +1, only_positive=True)
    rollouts = Term("rollouts", ROLLOUT, Current(), rollout_advantage, ConstantLength(s.length), counted=BOTH)
    reinforce_demonstrations = Term(
        "off_policy",
        DEMONSTRATION,
        One(),
        a.GroupStandardised(union=True),
        ConstantLength(s.length),
        coefficient=s.algorithm.off_policy_coefficient,
        counted=BOTH,
    )
    terms = (rollouts, imitate, reinforce_demonstrations)
    return Algorithm(terms, Union(gates.without_demonstration(s.algorithm.gate)))


def hpt(s: Settings) -> Algorithm:
    """Hybrid post-training (arXiv 2509.04419): Dr. GRPO above the gate, SFT below.

    As in the reference code the ratio is not clipped, and demonstrations are a token mean. Unlike there, both
    denominators are global, and every prompt weighs the same (eq. 13): the reference sums rollouts over rows and
    averages demonstrations within a micro-batch, so the balance of the two depends on how the batch was cut. With
    algorithm.gate.off_policy_threshold, prompts between the two thresholds train their demonstration by off-policy RL;
    with algorithm.gate.soft both losses live on a prompt.
    """
    return Algorithm(balanced(s, centred(s), likelihood(s), *band(s)), gates.hybrid(s.algorithm.gate))


def hpt_reference(s: Settings) -> Algorithm:
    """HPT with the reference code's as-run arithmetic: its gradient depends on micro-batches and ranks, as there."""
    rollouts = replace(centred(s), advantage=a.ReferenceGroup(), aggregation=ReferenceConstantWidth(s.length))
    demonstrations = replace(likelihood(s), aggregation=ReferenceTokenMean())
    terms = (rollouts, demonstrations, *(replace(t, aggregation=ReferenceConstantWidth(s.length)) for t in band(s)))
    return Algorithm(terms, gates.hybrid(s.algorithm.gate), entropy_aggregation=ReferenceTokenMean())


def off_on(s: Settings) -> Algorithm:
    """OFF/ON, an ablation of HPT: below the gate off-policy RL on the demonstration in place of SFT."""
    return Algorithm(balanced(s, centred(s), off_policy(s, DEMONSTRATION | OFF_POLICY)), gates.hybrid(s.algorithm.gate))


def mix_on(s: Settings) -> Algorithm:
    """Mix/ON, an ablation of HPT: below the gate SFT and off-policy RL on the same demonstration.

    The paper's mixture is algorithm.demonstration_coefficient=0.1 with algorithm.off_policy_coefficient=1.
    """
    both = off_policy(s, DEMONSTRATION | OFF_POLICY)
    return Algorithm(balanced(s, centred(s), likelihood(s), both), gates.hybrid(s.algorithm.gate))


def sft_grpo(s: Settings) -> Algorithm:
    """SFT→GRPO in two phases: algorithm.sft_steps of SFT, then GRPO."""
    gate = Phases(AlwaysDemonstrations(), AlwaysRollouts(), s.algorithm.sft_steps)
    return Algorithm((clipped_grpo(s), likelihood(s)), gate)


def chord(s: Settings) -> Algorithm:
    """A global mixture like CHORD's (arXiv 2508.11408): μ SFT + (1-μ) GRPO, μ falling by step, SFT shaped by p(1-p)."""
    mixture = s.algorithm.mixture
    without = gates.without_demonstration(s.algorithm.gate)
    gate = Mixture(mixture.start, mixture.end, mixture.steps or s.steps, without)
    demonstrations = replace(likelihood(s), reference=One(), shaping=Uncertain())
    return Algorithm((clipped_grpo(s), demonstrations), gate)


ALGORITHMS: dict[str, Record] = {
    record.__name__: record
    for record in (
        *(sft, reinforce, rloo, reinforce_pp, ppo, grpo, dr_grpo, dapo, cispo, gspo),
        *(luffy, srft, hpt, hpt_reference, off_on, mix_on, sft_grpo, chord),
    )
}


def of_run(config: Config) -> Algorithm:
    """The algorithm of a run; see `build`."""
    return build(config.algorithm, config.data.max_response_length, config.trainer.steps)


def check(config: Config, algorithm: Algorithm) -> None:
    """Refuse settings with which the algorithm cannot be trained.

    Raises:
        ConfigError: it needs what is not there; names the key.
    """
    name, samples = config.algorithm.name, config.rollout.samples_per_prompt
    if algorithm.needs_values:
        raise ConfigError(
            f"algorithm.name: {name} estimates advantages from a critic's values, and there is no critic model yet; "
            "grpo, rloo and reinforce_pp need none"
        )
    if isinstance(algorithm.gate, Phases) and not 0 < algorithm.gate.at < config.trainer.steps:
        raise ConfigError(
            f"algorithm.sft_steps: given {algorithm.gate.at}; the first phase takes 1 to {config.trainer.steps - 1} steps"
        )
    if isinstance(algorithm.gate, Union) and samples < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt: given {samples}; {name} puts a demonstration in place of one: at least 2"
        )
    if samples < 2 and any(isinstance(term.advantage, Grouped) for term in algorithm.terms):
        raise ConfigError(
            f"rollout.samples_per_prompt: given {samples}; {name} compares the answers to a prompt with each other, and one "
            "alone teaches nothing: at least 2"
        )


def build(config: AlgorithmConfig, max_response_length: int, steps: int = 1) -> Algorithm:
    """The record that a recipe names, with the recipe's entropy bonus, KL penalty and mismatch correction around it.

    Raises:
        ConfigError: no such row in the table, or a function of one's own that cannot be imported or gives something else.
    """
    settings = Settings(config, config.constant_length or max_response_length, steps)
    try:
        algorithm = lookup(config.name)(settings)
    except TypeError as error:
        if ":" not in config.name:
            raise
        raise ConfigError(f"algorithm.name: {config.name} cannot be called with its settings: {error}") from None
    if not isinstance(algorithm, Algorithm):
        raise ConfigError(f"algorithm.name: {config.name} returned {type(algorithm).__name__}; expected an Algorithm")
    for role in algorithm.gate.roles - {role for term in algorithm.terms for role in term.roles}:
        raise ConfigError(f"algorithm: the gate of {config.name} may choose {role.name.lower()} rows, and no term trains them")
    if config.kl.coefficient and Role.ROLLOUT not in algorithm.gate.roles:
        raise ConfigError(
            f"algorithm.kl.coefficient: given {config.kl.coefficient:g}; {config.name} has no rollouts to measure it on"
        )
    around = {"entropy": _entropy(config), "kl": _kl(config)}
    given = {name: choice for name, choice in around.items() if choice is not None}  # else what the record itself says
    return replace(algorithm, terms=tuple(_corrected(term, config) for term in algorithm.terms), **given)


def without_effect(config: Config) -> list[str]:
    """Settings below ``algorithm`` that differ from their defaults and change nothing in the algorithm named there."""
    algorithm = of_run(config)
    idle = []
    for path, default in _changed(config.algorithm, AlgorithmConfig(name=config.algorithm.name)):
        key = ".".join(path)
        if key in _READ_ELSEWHERE:
            effective = _READ_ELSEWHERE[key](algorithm)
        else:
            effective = _built_with(config, path, default) != algorithm
        if not effective:
            idle.append(f"algorithm.{key}")
    return idle


_READ_ELSEWHERE: dict[str, Callable[[Algorithm], bool]] = {
    "max_rounds": lambda algorithm: algorithm.gate.refills,
    "kl.reference": lambda algorithm: algorithm.kl is not None,
    "old_policy": lambda algorithm: any(Role.ROLLOUT in term.roles and _has_old(term) for term in algorithm.terms),
    **dict.fromkeys(
        ("overlong.buffer", "overlong.penalty", "overlong.mask", "mismatch.stop_above"),
        lambda algorithm: Role.ROLLOUT in algorithm.gate.roles,
    ),
}
"""Settings that are not part of the record, and when they are read."""


def _has_old(term: Term) -> bool:
    """The term reads π_θold: for its ratio (π_ref = π_θ has none), or for its correction."""
    return not isinstance(term.reference, Current | One) or not isinstance(term.correction, c.NoCorrection)


def _changed(section: Section, defaults: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Paths of the settings that differ from their defaults, with those."""
    for name in type(section).model_fields:
        value, default = getattr(section, name), getattr(defaults, name)
        if isinstance(value, Section):
            yield from _changed(value, default, (*path, name))
        elif value != default:
            yield (*path, name), default


def _built_with(config: Config, path: tuple[str, ...], value: object) -> Algorithm | None:
    """The algorithm with another value of one setting; None if it cannot be."""
    sections = [config, config.algorithm]
    for name in path[:-1]:
        sections.append(getattr(sections[-1], name))
    for section, name in zip(reversed(sections), reversed(("algorithm", *path)), strict=True):
        value = section.model_copy(update={name: value})
    try:
        return of_run(value)
    except ConfigError:
        return None


def lookup(name: str) -> Record:
    """A row of the table, or an imported one.

    Raises:
        ConfigError: there is none.
    """
    if ":" in name:
        return import_function(name, "algorithm.name")
    if name not in ALGORITHMS:
        hint = did_you_mean(name, ALGORITHMS)
        raise ConfigError(f"algorithm.name: given {name!r}; allowed: {', '.join(ALGORITHMS)}, or module:function{hint}")
    return ALGORITHMS[name]


def _entropy(config: AlgorithmConfig) -> EntropyBonus | None:
    given = config.entropy
    if given.target is not None and given.coefficient == 0:
        raise ConfigError(
            "algorithm.entropy.target: an adaptive coefficient starts from algorithm.entropy.coefficient; it is 0"
        )
    return EntropyBonus(given.coefficient, given.demonstrations, given.target, given.rate) if given.coefficient else None


def _kl(config: AlgorithmConfig) -> KlPenalty | None:
    given = config.kl
    return KlPenalty(ESTIMATORS[given.estimator], given.coefficient, given.place == "reward") if given.coefficient else None


def _corrected(term: Term, config: AlgorithmConfig) -> Term:
    """The term with the recipe's correction, where it has one and the term is of rollouts.

    Raises:
        ConfigError: the term applies to other rows as well, which have no engine to be corrected for.
    """
    given = config.mismatch
    if given.correction == "none" or Role.ROLLOUT not in term.roles:
        return term
    if term.roles != ROLLOUT:
        raise ConfigError(f"algorithm.mismatch.correction: term {term.name} mixes rollouts with other rows; corrections cannot")
    sequence = given.level == "sequence"
    corrections = {
        "tis": c.Truncated(given.high, sequence),
        "mis": c.Masked(given.high, sequence),
        "icepop": c.IcePop(given.high, sequence, given.low),
    }
    return replace(term, correction=corrections[given.correction])
