"""The reference's advantages, gate, KL, and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hpt.data.order import BlockLayout, Shuffle
from megatron_hpt.data.prompts import demonstration_tokens
from megatron_hpt.objective import advantage as a
from megatron_hpt.objective.gate import Choice, Situation, Soft, Switch, Thresholds
from megatron_hpt.objective.kl import K1, K2, K3
from megatron_hpt.objective.reference_code import Absolute, reference_bessel
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.shaping import Saturating
from megatron_hpt.objective.tokens import Tokens
from megatron_hpt.objective.value import value_loss

from .cases import Case, Comparison


def _outcomes(case: Case) -> list[a.Outcome]:
    """One outcome a row; a reward may stand at any token."""
    masks, groups = case.inputs["eos_mask"], {}
    names = case.inputs.get("index") or list(range(len(masks)))
    on_policy = case.inputs.get("on_policy_mask") or [True] * len(masks)
    return [
        a.Outcome(
            group=groups.setdefault(name, len(groups)),
            reward=0.0,
            length=sum(mask),
            demonstration=not own,
            token_rewards=rewards[: sum(mask)],
        )
        for name, own, mask, rewards in zip(names, on_policy, masks, case.inputs["token_level_rewards"], strict=True)
    ]


def _spread(estimates: list[a.Estimate], masks: list[list[int]]) -> list[list[float]]:
    """Estimates at every valid token, 0 elsewhere."""
    rows = []
    for estimate, mask in zip(estimates, masks, strict=True):
        values = estimate if isinstance(estimate, list) else [estimate] * sum(mask)
        rows.append([*values, *[0.0] * (len(mask) - len(values))])
    return rows


def _valid(values: list[list[float]], masks: list[list[int]]) -> list[list[float]]:
    return [row[: sum(mask)] for row, mask in zip(values, masks, strict=True)]


def check_advantage(case: Case) -> Iterator[Comparison]:
    """The outcome estimators: grpo, grpo_split, grpo_balance, reinforce."""
    standardise = case.config.get("use_std", False)
    estimators: dict[str, a.Advantage] = {
        "compute_grpo_outcome_advantage": a.ReferenceGroup(union=True, standardise=standardise),
        "compute_grpo_outcome_advantage_split": a.ReferenceGroup(standardise=standardise),
        "compute_grpo_balance_outcome_advantage": a.Sign(),
        "compute_reinforce_outcome_advantage": a.Return(),
    }
    ours = _spread(estimators[case.function].estimate(_outcomes(case)), case.inputs["eos_mask"])
    if "raises" in case.expected:
        reason = "a group without rollouts raises KeyError in the reference; here such a demonstration keeps its reward"
        yield Comparison("advantages", ours, None, reason)
        return
    yield Comparison("advantages", ours, case.expected["advantages"])


def check_reinforce_pp(case: Case) -> Iterator[Comparison]:
    """Compare REINFORCE++'s discounted returns, whitened."""
    masks, outcomes = case.inputs["eos_mask"], _outcomes(case)
    returns = [a.returns(outcome.rewards(), case.config["gamma"]) for outcome in outcomes]
    ours = a.whitened(returns, bessel=reference_bessel)
    yield Comparison("advantages", ours, _valid(case.expected["advantages"], masks))
    yield Comparison("returns", returns, _valid(case.expected["returns"], masks))


def check_gae(case: Case) -> Iterator[Comparison]:
    """Generalised advantages. The reference runs them over padding too, so here the whole width is the row."""
    masks = case.inputs["eos_mask"]
    pairs = zip(case.inputs["token_level_rewards"], case.inputs["values"], strict=True)
    raw = [a.generalised(rewards, values, case.config["gamma"], case.config["lam"]) for rewards, values in pairs]
    ours = a.whitened(_valid(raw, masks), bessel=reference_bessel)
    yield Comparison("advantages", ours, _valid(case.expected["advantages"], masks))
    returns = [[x + v for x, v in zip(*row, strict=True)] for row in zip(raw, case.inputs["values"], strict=True)]
    yield Comparison("returns", returns, case.expected["returns"])


def check_kl(case: Case) -> Iterator[Comparison]:
    """Per-token KL estimators."""
    estimators = {"kl": K1(), "abs": Absolute(), "mse": K2(), "low_var_kl": K3(bound=10.0)}
    logprobs = torch.tensor(case.inputs["logprob"], dtype=torch.float64).requires_grad_()
    value = estimators[case.config["kl_penalty"]](logprobs - torch.tensor(case.inputs["ref_logprob"], dtype=torch.float64))
    yield Comparison("value", value.detach(), case.expected["value"])
    value.sum().backward()
    if "logprob_of_sum" in case.gradients:
        yield Comparison("dΣ/dlogprob", logprobs.grad, case.gradients["logprob_of_sum"])


def check_value_loss(case: Case) -> Iterator[Comparison]:
    """The critic's clipped loss."""
    mask = torch.tensor(case.inputs["eos_mask"]).bool()
    values, old, returns = (torch.tensor(case.inputs[k], dtype=torch.float64)[mask] for k in ("vpreds", "values", "returns"))
    loss = value_loss(values, old, returns, case.config["cliprange_value"])
    yield Comparison("vf_loss", loss.total / mask.sum(), case.expected["vf_loss"])
    yield Comparison("vf_clipfrac", loss.clipped / mask.sum(), case.expected["vf_clipfrac"])


def check_shaping(case: Case) -> Iterator[Comparison]:
    """f(p) = p / (p + γ) and its derivatives."""
    # p = 0 has no logarithm: its limit stands for it.
    logs = torch.tensor(case.inputs["p"], dtype=torch.float64).clamp(min=1e-300).log().requires_grad_()
    value = Saturating(case.config["gamma"])(logs)
    value.sum().backward()
    yield Comparison("f", value.detach(), case.expected["f"])
    yield Comparison("df/dlog p", logs.grad, case.expected["dloss_dlogp_over_minusA"])
    yield Comparison("df/dp", logs.grad / logs.detach().exp(), case.expected["df_dp"])


def check_entropy_weights(case: Case) -> Iterator[Comparison]:
    """SRFT's weights of rows with given entropies."""
    entropy = torch.tensor(case.inputs["H"], dtype=torch.float64)
    tokens = _rows_of_one(entropy)
    yield Comparison("sft_coef", a.EntropyScaled(a.One(), 0.5, -1).apply(tokens), case.expected["sft_coef"])
    yield Comparison("on_coef", a.EntropyScaled(a.One(), 0.1, +1).apply(tokens), case.expected["on_coef"])


def _rows_of_one(entropy: Tensor) -> Tokens:
    one, zero = torch.ones_like(entropy), torch.zeros_like(entropy)
    rows = torch.arange(len(entropy))
    roles = torch.full_like(rows, int(Role.DEMONSTRATION))
    return Tokens(zero, entropy, zero, one, one, one, rows, roles)


_ROW = {Choice.DEMONSTRATION: [8, 0, 1], Choice.OFF_POLICY: [8, 0, -1], Choice.ROLLOUTS: [0, 0, 0], Choice.BOTH: [0, 0, 1]}
"""A choice as the reference writes it: rollouts removed, rollouts added, demonstrations (-1: for off-policy RL)."""


def check_gate(case: Case) -> Iterator[Comparison]:
    """select_on_off_ada_balance, for n = 8."""
    strategy = case.config["unify_strategy"]
    if strategy == "switch":
        gate = Switch(Thresholds(case.config["switch_gate"], case.config["switch_gate_off"]))
    elif strategy == "soft":
        gate = Soft(lambda _: 1.0, lambda _: 1.0)
    else:
        reason = f"the reference returns None for {strategy!r} and crashes; no such gate can be named here"
        yield Comparison("rows", None, case.expected["rows"], reason)
        return
    decisions = [gate(Situation("p", [1.0] * k + [0.0] * (8 - k), True)) for k in case.inputs["on_solve_num"]]
    yield Comparison("rows", [_ROW[decision.choice] for decision in decisions], case.expected["rows"])


def check_eos_mask(case: Case) -> Iterator[Comparison]:
    """A response ends with its first end-of-sequence, inclusive; the trained tokens are those of the row."""
    end, rows = case.config["eos_token"], case.inputs["response_id"]
    lengths = [row.index(end) + 1 if end in row else len(row) for row in rows]
    ours = [[1] * length + [0] * (len(row) - length) for row, length in zip(rows, lengths, strict=True)]
    yield Comparison("mask", ours, case.expected["mask"])


def check_logits(case: Case) -> Iterator[Comparison]:
    """Log-probabilities and entropy of logits, with both gradients, through the vocabulary-parallel kernel.

    The output layer is the unit matrix, so the hidden states are the logits.
    """
    from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy

    labels = torch.tensor(case.inputs["labels"])
    for index, (name, gradient) in enumerate({"log_prob": "sum_log_prob", "entropy": "sum_entropy"}.items()):
        logits = torch.tensor(case.inputs["logits"], dtype=torch.float64).requires_grad_()
        vocab = logits.shape[-1]
        with _group_of_one() as group:
            unit = torch.eye(vocab, dtype=torch.float64)
            outputs = logprob_and_entropy(logits.flatten(0, -2), unit, labels.flatten(), Vocabulary(vocab, 0, group))
        outputs[index].sum().backward()
        yield Comparison(name, outputs[index].detach().reshape(labels.shape), case.expected[name])
        yield Comparison(f"d{gradient}/dlogits", logits.grad, case.gradients[f"logits_of_{gradient}"])


@contextmanager
def _group_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone, gone afterwards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def check_demonstration_row(case: Case) -> Iterator[Comparison]:
    """generate_off_sequences: a demonstration as a response."""
    pad, end, limit = (case.config[key] for key in ("pad_token_id", "eos_token_id", "response_length"))
    for index, padded in enumerate(case.inputs["tgt_input_ids"]):
        target = [token for token in padded if token != pad]
        theirs = [
            t for t, own in zip(case.expected["responses"][index], case.expected["prefix_mask"][index], strict=True) if own
        ]
        ours = demonstration_tokens(target, end, limit, "cut", case.name)
        if ours is None:
            yield Comparison("responses", None, theirs, "the reference trains padding; here there is no demonstration")
            continue
        yield Comparison("responses", ours, theirs)
        yield from _positions(case, index, ours)


def _positions(case: Case, index: int, response: list[int]) -> Iterator[Comparison]:
    """Packed rows have no padding: what the reference masks is not there."""
    prompt = sum(case.inputs["attention_mask"][index])
    mask = case.expected["attention_mask"][index]
    yield Comparison("valid tokens", prompt + len(response), sum(mask))
    positions = [p for p, valid in zip(case.expected["position_ids"][index], mask, strict=True) if valid]
    yield Comparison("position_ids", list(range(prompt + len(response))), positions)


def check_sampler(case: Case) -> Iterator[Comparison]:
    """One permutation an epoch. Ours is a function of seed and position, so that nothing has to be saved to resume."""
    number = case.config["n"]
    shuffle = Shuffle(BlockLayout([range(number)]), (case.config["seed"],))
    epochs: dict[str, Any] = {
        f"epoch{epoch + 1}": [shuffle.at(epoch * number + draw) for draw in range(number)] for epoch in (0, 1)
    }
    for name, ours in epochs.items():
        yield Comparison(f"{name} as a set", sorted(ours), sorted(case.expected[name]))
        reason = "another permutation: the reference's depends on a generator's history, ours on seed and position alone"
        yield Comparison(name, ours, case.expected[name], reason)
