"""The reference's losses as terms of this project's estimator.

Padded arrays [rows, width] are flattened as they are; padded positions have weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_hpt.objective import advantage as a
from megatron_hpt.objective.aggregation import Aggregation, ReferenceConstantWidth, ReferenceTokenMean
from megatron_hpt.objective.algorithm import Algorithm, Term
from megatron_hpt.objective.estimator import TermTokens, evaluate, unified_loss
from megatron_hpt.objective.gate import AlwaysRollouts
from megatron_hpt.objective.kl import EntropyBonus
from megatron_hpt.objective.reference import Current, Old, One, Reference
from megatron_hpt.objective.reference_code import (
    Bounded,
    DropLikely,
    Logarithm,
    OldShaped,
    PlusLogarithm,
    Power,
    ReferenceSrftClip,
    Rejection,
    Teacher,
)
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Identity, Saturating, Shaping
from megatron_hpt.objective.stability import Clip, NoMask, Stability
from megatron_hpt.objective.tokens import Counts, Denominators, Tokens

from .cases import Case, Comparison

ROLLOUT, DEMONSTRATION, OFF_POLICY = (frozenset({role}) for role in Role)
ALL = frozenset(Role)
ALWAYS_ZERO = "compared after the maximum in the reference (core_algos.py), so always 0; the share of clipped tokens here"
EMPTY_MEAN = "0/0 in the reference, which poisons the whole optimizer step; a term without tokens is an exact zero here"
NO_DEMONSTRATIONS = "0/0 in the reference, found by isnan and skipped; an exact zero here"


@dataclass
class Arrays:
    """The inputs of a case as float64 leaves."""

    inputs: dict[str, Any]
    logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Arrays:
        """Read them; a case that gives only a shape has no rows."""
        shape = inputs.get("shape") or _shape(inputs["log_prob"])
        logprobs = _array(inputs.get("log_prob"), shape).requires_grad_()
        entropy = _array(inputs.get("entropy"), shape).requires_grad_()
        mask = _array(inputs.get("eos_mask"), shape)
        return cls(inputs, logprobs, entropy, mask, _array(inputs.get("prefix_mask"), shape).bool())

    @property
    def width(self) -> int:
        """T: the padded width."""
        return self.logprobs.shape[1]

    @property
    def demonstration_rows(self) -> Tensor:
        """bool [rows, width]: of a row with any demonstration token."""
        return self.prefix.any(-1, keepdim=True).expand_as(self.prefix)

    def tokens(self, roles: Tensor, advantages: Tensor | None = None, teacher: bool = True) -> Tokens:
        """Return the inputs as the estimator's tokens.

        Args:
            roles: [rows, width].
            advantages: default: the case's own.
            teacher: demonstration tokens carry their writer's probabilities, where the case has them.
        """
        rows = torch.arange(len(self.mask))[:, None].expand_as(self.mask)
        given = _array(self.inputs.get("advantages"), self.mask.shape) if advantages is None else advantages
        behaviour = _array(self.inputs.get("old_log_prob"), self.mask.shape)
        if teacher and self.inputs.get("target_probs") is not None:
            behaviour = torch.where(self.prefix, _array(self.inputs["target_probs"], self.mask.shape).log(), behaviour)
        return Tokens(
            logprobs=self.logprobs.flatten(),
            entropy=self.entropy.flatten(),
            behaviour_logprobs=behaviour.flatten(),
            advantages=given.flatten(),
            weights=self.mask.flatten(),
            row_lengths=self.mask.sum(-1, keepdim=True).expand_as(self.mask).flatten(),
            rows=rows.flatten(),
            roles=roles.flatten(),
        )

    def roles(self, demonstration: Tensor, role: Role = Role.DEMONSTRATION) -> Tensor:
        """`role` where the mask says so, rollouts elsewhere."""
        return torch.where(demonstration, int(role), int(Role.ROLLOUT))

    def mean(self, values: Tensor, where: Tensor) -> Tensor:
        """Mean over valid tokens; NaN without any."""
        valid = self.mask * where
        return (values.reshape(self.mask.shape) * valid).sum() / valid.sum()

    def fraction(self, chosen: Tensor, where: Tensor | None = None) -> Tensor:
        """Share of valid tokens, in single precision as the reference has it; NaN without any."""
        mask = (self.mask if where is None else self.mask * where).float()
        return (chosen.reshape(mask.shape).float() * mask).sum() / mask.sum()


def _shape(values: Sequence) -> tuple[int, int]:
    return len(values), len(values[0]) if values else 0


def _array(values: Any, shape: Sequence[int]) -> Tensor:
    return (
        torch.zeros(*shape, dtype=torch.float64)
        if values is None
        else torch.tensor(values, dtype=torch.float64).reshape(*shape)
    )


@dataclass(frozen=True)
class Piece:
    """Terms with the tokens that they see; the reference splits rows for some terms, and tokens for others."""

    terms: tuple[Term, ...]
    tokens: Tokens


def total(pieces: Sequence[Piece], ranks: int = 1, entropy: EntropyBonus | None = None) -> Tensor:
    """The loss of all pieces; the entropy bonus is over all valid tokens of the first."""
    loss = torch.zeros((), dtype=torch.float64)
    for index, piece in enumerate(pieces):
        bonus = entropy if index == 0 and entropy is not None else EntropyBonus()
        algorithm = Algorithm(piece.terms, AlwaysRollouts(), bonus, ReferenceTokenMean())
        denominators = Denominators({role: Counts() for role in Role}, ranks)  # reference aggregations count for themselves
        loss = loss + unified_loss(algorithm, piece.tokens, denominators).total
    return loss


# --- terms -------------------------------------------------------------------------------------------------------------


def aggregation(config: dict[str, Any], width: int) -> Aggregation:
    """Return the aggregation that loss_remove_token_mean chooses."""
    if config["loss_remove_token_mean"]:
        return ReferenceConstantWidth(width)
    return ReferenceTokenMean(config.get("all_max_clip") or 1.0)


def clip(config: dict[str, Any]) -> Stability:
    """Return the mask that loss_remove_clip chooses."""
    low = config.get("cliprange", config.get("clip_ratio"))
    if config["loss_remove_clip"]:
        return NoMask()
    return Clip(low, max(config.get("clip_upper_bound", 1.0), 1 + low) - 1)


def on_shaping(config: dict[str, Any]) -> tuple[Reference, Shaping]:
    """Return what on_policy_reshape chooses."""
    name, weight = config.get("on_policy_reshape", "no_reshape"), config.get("on_policy_reshape_weight", 1.0)
    if name.startswith("p_div_p_"):
        return OldShaped(), Saturating(float(name.removeprefix("p_div_p_")))
    choices = {
        "no_reshape": Identity(),
        "logp": Logarithm(),
        "p_logp": PlusLogarithm(weight),
        "square_root": Power(0.5),
        "pow": Power(config.get("on_policy_reshape_pow_exp", 0.5)),
    }
    return Old(), choices[name]


def off_shaping(config: dict[str, Any], inputs: dict[str, Any]) -> tuple[Reference, Shaping]:
    """Return what off_policy_reshape chooses; known teacher probabilities take its place."""
    if inputs.get("target_probs") is not None:
        return Teacher(1e-6), Identity()
    name, weight = config["off_policy_reshape"], config.get("off_policy_reshape_weight", 1.0)
    if name.startswith("p_div_p_"):
        return One(), Saturating(float(name.removeprefix("p_div_p_")))
    if name == "classic_reject_token":
        return One(), Rejection(torch.tensor(inputs["random_val"], dtype=torch.float64).flatten())
    choices = {
        "no_reshape": Identity(),
        "logp": Logarithm(weight),
        "p_logp": PlusLogarithm(weight),
        "square_root": Power(0.5),
        "pow": Power(config.get("off_policy_reshape_pow_exp", 0.5)),
    }
    return One(), choices[name]


def _dropping(stability: Stability, config: dict[str, Any]) -> Stability:
    above = config.get("all_max_clip")
    return stability if above is None else DropLikely(above, stability)


def rollout_term(config: dict[str, Any], width: int) -> Term:
    """compute_policy_loss: PPO on rollouts."""
    return Term("rollouts", ROLLOUT, Old(), a.Return(), aggregation(config, width), clip(config))


def on_term(config: dict[str, Any], width: int) -> Term:
    """The on-policy half of compute_token_on_off_policy_loss."""
    reference, shaping = on_shaping(config)
    mask = _dropping(clip(config), config)
    return Term("rollouts", ROLLOUT, reference, a.Return(), aggregation(config, width), mask, shaping, counted=ALL)


def srft_term(config: dict[str, Any], width: int, advantage: a.Advantage) -> Term:
    """The on-policy half of SRFT's loss, with its clip as it runs."""
    choices = {"exp": (One(), Identity()), "classic_rl": on_shaping(config), "minus_old": (Old(), Logarithm())}
    reference, shaping = choices.get(config["srft_type"], (Current(), Identity()))
    mask = clip(config)
    if isinstance(mask, Clip):
        mask = ReferenceSrftClip(mask.low, mask.high)
    mask = _dropping(mask, config)
    return Term("rollouts", ROLLOUT, reference, advantage, aggregation(config, width), mask, shaping, counted=ALL)


def off_term(
    config: dict[str, Any], inputs: dict[str, Any], width: int, roles: frozenset[Role] = DEMONSTRATION, coefficient: float = 1.0
) -> Term:
    """The off-policy half."""
    reference, shaping = off_shaping(config, inputs)
    low, high = config.get("off_min_clip"), config.get("off_max_clip")
    mask = _dropping(NoMask() if low is None and high is None else Bounded(low, high), config)
    weights = aggregation(config, width)
    return Term("off_policy", roles, reference, a.Return(), weights, mask, shaping, coefficient=coefficient, counted=ALL)


def sft_term(coefficient: float = 1.0, advantage: a.Advantage | None = None) -> Term:
    """compute_sft_pure_loss."""
    return Term("demonstrations", DEMONSTRATION, Current(), advantage or a.One(), ReferenceTokenMean(), coefficient=coefficient)


# --- checkers ----------------------------------------------------------------------------------------------------------


def _compare_loss(case: Case, key: str, loss: Tensor, arrays: Arrays, empty: bool) -> Iterator[Comparison]:
    """Value, then gradients.

    Args:
        empty: whether a mean of the loss is over no token, so that NaN is what the reference must give.
    """
    theirs = case.expected[key]
    treated = EMPTY_MEAN if math.isnan(theirs) and empty else ""
    yield Comparison(key, loss, theirs, treated)
    loss.backward()
    leaves = {"log_prob": arrays.logprobs, "entropy": arrays.entropy}
    for name, leaf in leaves.items():
        if name in case.gradients:
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            yield Comparison(f"d{key}/d{name}", gradient, case.gradients[name], treated)


def check_sft(case: Case) -> Iterator[Comparison]:
    """compute_sft_pure_loss and compute_sft_token_loss."""
    arrays = Arrays.of(case.inputs)
    tokens = arrays.tokens(arrays.roles(torch.ones_like(arrays.prefix)))
    yield from _compare_loss(case, "loss", total([Piece((sft_term(),), tokens)]), arrays, not arrays.mask.any())
    if "per_sequence_loss" in case.expected:
        losses = evaluate(sft_term(), tokens).losses.reshape(arrays.mask.shape)
        yield Comparison("per_sequence_loss", losses.sum(-1) / arrays.mask.sum(-1), case.expected["per_sequence_loss"])


def check_policy(case: Case) -> Iterator[Comparison]:
    """compute_policy_loss."""
    arrays = Arrays.of(case.inputs)
    term, tokens = rollout_term(case.config, arrays.width), arrays.tokens(arrays.roles(arrays.prefix))
    yield from _compare_loss(case, "pg_loss", total([Piece((term,), tokens)]), arrays, not arrays.mask.any())
    clipped = replace(term, stability=clip({**case.config, "loss_remove_clip": False}))
    fraction = arrays.fraction(~evaluate(clipped, tokens).kept)
    if _is_compared_after_the_maximum(case):
        yield Comparison("pg_clipfrac of the reference", 0.0, case.expected["pg_clipfrac"])
        yield Comparison("pg_clipfrac", fraction, None, ALWAYS_ZERO)
    else:
        yield Comparison("pg_clipfrac", fraction, case.expected["pg_clipfrac"])
    yield from _diagnostics(
        case,
        ppo_kl=arrays.mean(tokens.behaviour_logprobs - tokens.logprobs, torch.ones_like(arrays.mask)),
    )


def _is_compared_after_the_maximum(case: Case) -> bool:
    """Without clipping the reference says how much would have been clipped, with clipping it says 0."""
    return "shape" not in case.inputs and not case.config["loss_remove_clip"]


def _diagnostics(case: Case, **ours: Tensor) -> Iterator[Comparison]:
    for name, value in ours.items():
        if name in case.expected:
            yield Comparison(name, value.detach(), case.expected[name])


def check_on_off(case: Case) -> Iterator[Comparison]:
    """compute_token_on_off_policy_loss, with a coefficient, with rows left out, and SRFT's."""
    arrays = Arrays.of(case.inputs)
    config = {**case.config, "srft_type": case.inputs.get("srft_type", case.config.get("srft_type"))}
    roles, advantages = arrays.roles(arrays.prefix), _array(case.inputs["advantages"], arrays.mask.shape)
    off_roles, coefficient = DEMONSTRATION, case.inputs.get("off_loss_coef", 1.0)
    if "off_rl_mask" in case.inputs:
        off_rl = torch.tensor(case.inputs["off_rl_mask"]).bool()[:, None] & arrays.prefix
        roles, off_roles = torch.where(off_rl, int(Role.OFF_POLICY), roles), OFF_POLICY
    on = on_term(config, arrays.width)
    if config["srft_type"] is not None:
        weight = torch.tensor(case.inputs["on_coef"], dtype=torch.float64)[:, None].expand_as(advantages)
        correct = torch.tensor(case.inputs["correct_answer_mask"]).bool()[:, None]
        on_advantages = torch.where(correct, weight, -1.0)
        advantages = torch.where(arrays.prefix, advantages, on_advantages)
        on = srft_term(config, arrays.width, a.Return())
    off = off_term(config, case.inputs, arrays.width, off_roles, coefficient)
    tokens = arrays.tokens(roles, advantages)
    yield from _compare_loss(case, "pg_loss", total([Piece((on, off), tokens)]), arrays, not arrays.mask.any())
    on_everywhere = on_advantages if config["srft_type"] is not None else advantages
    yield from _on_off_diagnostics(case, arrays, on, off, on_everywhere)


def _on_off_diagnostics(case: Case, arrays: Arrays, on: Term, off: Term, on_advantages: Tensor) -> Iterator[Comparison]:
    """The reference's metrics: each half is measured as if it applied everywhere, before rows and tokens are left out."""
    undropped = [replace(t, stability=getattr(t.stability, "inner", t.stability), roles=ROLLOUT) for t in (on, off)]
    everywhere = torch.zeros_like(arrays.prefix, dtype=torch.int64)
    on_tokens: TermTokens = evaluate(undropped[0], arrays.tokens(everywhere, on_advantages, teacher=False))
    off_tokens = evaluate(undropped[1], arrays.tokens(everywhere))
    plain = arrays.tokens(everywhere, teacher=False)
    ratio = torch.where(off_tokens.kept, off_tokens.surrogate, _bound(undropped[1].stability, off_tokens.surrogate))
    rollouts, demonstrations = (~arrays.prefix).double(), arrays.prefix.double()
    limits = {"max": case.config.get("off_max_clip"), "min": case.config.get("off_min_clip")}
    fractions = {
        f"off_ratio_{side}_clip_frac": arrays.fraction(ratio == limit, demonstrations) if limit is not None else torch.zeros(())
        for side, limit in limits.items()
    }
    yield from _diagnostics(
        case,
        on_pg_loss=arrays.mean(on_tokens.losses, rollouts),
        off_pg_loss=_or_zero(arrays.mean(off_tokens.losses, demonstrations)),
        on_pg_clipfrac=arrays.fraction(~on_tokens.kept),
        off_pg_clipfrac=torch.zeros(()),
        ppo_kl=arrays.mean(plain.behaviour_logprobs - plain.logprobs, torch.ones_like(arrays.mask)),
        off_policy_prob=_or_zero(arrays.mean(plain.logprobs.exp(), demonstrations)),
        on_policy_prob=_or_zero(arrays.mean(_array(case.inputs["old_log_prob"], arrays.mask.shape).exp(), rollouts)),
        off_ratio_mean=_or_zero(arrays.mean(_before_rejection(off, plain, ratio), demonstrations)),
        **fractions,
    )


def _before_rejection(off: Term, tokens: Tokens, ratio: Tensor) -> Tensor:
    """The reference reports the probability, not what is left of it after the draw."""
    return tokens.logprobs.exp() if isinstance(off.shaping, Rejection) else ratio


def _bound(stability: Stability, surrogate: Tensor) -> Tensor:
    return surrogate.clamp(stability.low, stability.high) if isinstance(stability, Bounded) else surrogate


def _or_zero(value: Tensor) -> Tensor:
    return torch.nan_to_num(value.detach(), nan=0.0)


# --- compositions: what an actor update adds up -------------------------------------------------------------------------


def _micro_pieces(config: dict[str, Any], arrays: Arrays) -> tuple[list[Piece], list[Piece]]:
    """The imitating and the reinforcing pieces of one micro-batch, by offline_loss_type."""
    kind, width, inputs = config["offline_loss_type"], arrays.width, arrays.inputs
    by_row, by_token = arrays.tokens(arrays.roles(arrays.demonstration_rows)), arrays.tokens(arrays.roles(arrays.prefix))
    imitate = [Piece((sft_term(config["sft_loss_coef"]),), by_row)]
    both = Piece((on_term(config, width), off_term(config, inputs, width)), by_token)
    if kind == "sft":
        return imitate, [Piece((rollout_term(config, width),), by_row)]
    if kind == "off_policy":
        return [], [both]
    if kind == "switch_off_sft":
        weighted = off_term(config, inputs, width, coefficient=config["off_loss_coef"])
        return imitate, [replace(both, terms=(both.terms[0], weighted))]
    if kind == "off_sft":
        off = torch.tensor(inputs["whether_off"]).bool()[:, None]
        roles = torch.where(off & arrays.demonstration_rows, int(Role.OFF_POLICY), arrays.roles(arrays.demonstration_rows))
        token_roles = torch.where(arrays.prefix, torch.where(off, int(Role.OFF_POLICY), int(Role.DEMONSTRATION)), 0)
        terms = (on_term(config, width), off_term(config, inputs, width, OFF_POLICY))
        return [replace(imitate[0], tokens=arrays.tokens(roles))], [Piece(terms, arrays.tokens(token_roles))]
    if kind == "srft":
        return _srft_pieces(config, arrays)
    everything = arrays.tokens(torch.zeros_like(arrays.prefix, dtype=torch.int64))
    return [], [Piece((rollout_term(config, width),), everything)]


def _srft_pieces(config: dict[str, Any], arrays: Arrays) -> tuple[list[Piece], list[Piece]]:
    """SRFT weighs by entropy: SFT down, correct rollouts up (±1 for rollouts, whatever their group advantage)."""
    by_row = arrays.tokens(arrays.roles(arrays.demonstration_rows))
    imitate = Piece((sft_term(advantage=a.EntropyScaled(a.One(), 0.5, -1)),), by_row)
    scores = _array(arrays.inputs["token_level_scores"], arrays.mask.shape).sum(-1, keepdim=True)
    signs = torch.where(scores == 1, 1.0, -1.0).expand_as(arrays.mask)
    given = _array(arrays.inputs["advantages"], arrays.mask.shape)
    tokens = arrays.tokens(arrays.roles(arrays.prefix), torch.where(arrays.prefix, given, signs))
    weighted = a.EntropyScaled(a.Return(), 0.1, +1, only_positive=True)
    terms = (srft_term(config, arrays.width, weighted), off_term(config, arrays.inputs, arrays.width))
    return [imitate], [Piece(terms, tokens)]


def _entropy_bonus(config: dict[str, Any]) -> EntropyBonus:
    return EntropyBonus(config["entropy_coeff"])


def check_micro_batch(case: Case) -> Iterator[Comparison]:
    """The composition of mix_actor.update_policy on one micro-batch."""
    arrays = Arrays.of(case.inputs)
    imitate, reinforce = _micro_pieces(case.config, arrays)
    imitation, reinforcement = total(imitate), total(reinforce)
    coefficient = case.config["sft_loss_coef"] if case.config["offline_loss_type"] != "srft" else 1.0
    parts = {
        "sft_loss": imitation / coefficient,
        "rl_loss": reinforcement,
        "pg_loss": imitation + reinforcement,
        "entropy_loss": arrays.mean(arrays.entropy, torch.ones_like(arrays.mask)),
    }
    no_demonstrations = not any(piece.tokens.of(DEMONSTRATION).any() for piece in imitate)
    no_rollouts = case.config["offline_loss_type"] == "sft" and not (arrays.mask.bool() & ~arrays.demonstration_rows).any()
    for name, value in parts.items():
        if name in case.expected:
            theirs = case.expected[name]
            reason, empty = (NO_DEMONSTRATIONS, no_demonstrations) if name == "sft_loss" else (EMPTY_MEAN, no_rollouts)
            yield Comparison(name, value.detach(), theirs, reason if math.isnan(theirs) and empty else "")
    yield from _srft_weights(case, arrays)
    loss = total([*imitate, *reinforce], entropy=_entropy_bonus(case.config))
    yield from _compare_loss(case, "policy_loss", loss, arrays, no_rollouts)


def _srft_weights(case: Case, arrays: Arrays) -> Iterator[Comparison]:
    if "H_coef" not in case.expected:
        return
    tokens = arrays.tokens(arrays.roles(arrays.prefix), torch.ones_like(arrays.mask))
    yield Comparison("H_coef", _first(tokens.row_mean(tokens.entropy), arrays), case.expected["H_coef"])
    for name, (scale, sign) in {"sft_coef": (0.5, -1), "on_coef": (0.1, +1)}.items():
        weights = a.EntropyScaled(a.One(), scale, sign).apply(tokens)
        yield Comparison(name, _first(weights, arrays), case.expected[name])


def _first(values: Tensor, arrays: Arrays) -> Tensor:
    """A row's value, from its first token."""
    return values.detach().reshape(arrays.mask.shape)[:, 0]


def check_optimizer_step(case: Case) -> Iterator[Comparison]:
    """The gradient of one optimizer step: summed over micro-batches, averaged over ranks."""
    effective = torch.zeros((), dtype=torch.float64)
    micro_batches = {}
    described = {part["tag"]: part for part in case.expected["per_micro_batch"]}
    for inputs in case.inputs["micro_batches"]:
        arrays, theirs = Arrays.of(inputs), described[inputs["tag"]]  # its sft_loss and rl_loss are parts of policy_loss
        micro_batches[inputs["tag"]] = arrays
        imitate, reinforce = _micro_pieces(case.config, arrays)
        alone = total([*imitate, *reinforce], entropy=_entropy_bonus(case.config))
        yield Comparison(f"{inputs['tag']}.policy_loss", alone.detach(), theirs["policy_loss"])
        shared = total([*imitate, *reinforce], case.config["ranks"], _entropy_bonus(case.config))
        effective = effective + shared / case.config.get("gradient_accumulation", 1)
    yield Comparison("effective_loss", effective.detach(), case.expected["effective_loss"])
    effective.backward()
    for tag, gradients in case.gradients.items():
        leaves = {"log_prob": micro_batches[tag].logprobs, "entropy": micro_batches[tag].entropy}
        for name, theirs in gradients.items():
            yield Comparison(f"{tag}.d/d{name}", leaves[name].grad, theirs)
