"""Every row of the table once more, one token at a time, from the formulas of the papers: no tensors, no autograd."""

import math
import random
from dataclasses import dataclass, field

import torch

from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.tokens import Tokens

LENGTH, GAMMA = 7, 0.1


@dataclass
class HandRow:
    """One row as plain numbers."""

    role: Role
    weight: float
    advantage: float
    logprobs: list[float]
    old: list[float]
    entropy: list[float]
    reference: list[float]
    group: int = 0

    @property
    def length(self) -> int:
        return len(self.logprobs)


@dataclass
class Hand:
    """Value, and derivatives by log-probability and entropy of each row's tokens."""

    loss: float = 0.0
    logprobs: list[list[float]] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)


def make_rows(
    seed: int, number: int, roles: tuple[Role, ...] = (Role.ROLLOUT, Role.ROLLOUT, Role.DEMONSTRATION)
) -> list[HandRow]:
    """Random ragged rows, some with weight 0."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        n, role = rng.randint(1, 6), rng.choice(roles)
        rows.append(
            HandRow(
                role=role,
                weight=rng.choice([0.0, 1.0, 1.0, 0.5]),
                advantage=rng.choice([-1, 1]) * rng.uniform(0.1, 2),
                logprobs=[rng.uniform(-3, -0.01) for _ in range(n)],
                old=[rng.uniform(-3, -0.01) for _ in range(n)] if role is Role.ROLLOUT else [0.0] * n,
                entropy=[rng.uniform(0, 3) for _ in range(n)],
                reference=[rng.uniform(-3, -0.01) for _ in range(n)],
                group=rng.randrange(4),
            )
        )
    return rows


def flatten(rows: list[HandRow], dtype: torch.dtype = torch.float64, padding: int = 1, reference: bool = False) -> Tokens:
    """Rows as flat tensors, each after `padding` positions of weight 0 (a prompt, or the padding of a batch)."""

    def column(values, blank: float = 0.0) -> torch.Tensor:
        return torch.tensor([v for row in rows for v in [blank] * padding + list(values(row))], dtype=dtype)

    return Tokens(
        logprobs=column(lambda r: r.logprobs, -1.0).requires_grad_(),
        entropy=column(lambda r: r.entropy, 1.0).requires_grad_(),
        behaviour_logprobs=column(lambda r: r.old),
        advantages=column(lambda r: [r.advantage] * r.length),
        weights=column(lambda r: [r.weight] * r.length),
        row_lengths=column(lambda r: [float(r.length)] * r.length),
        rows=torch.tensor([i for i, r in enumerate(rows) for _ in range(padding + r.length)], dtype=torch.int64),
        roles=torch.tensor([int(r.role) for r in rows for _ in range(padding + r.length)], dtype=torch.int64),
        reference_logprobs=column(lambda r: r.reference, -1.0) if reference else None,
    )


def unflatten(gradient: torch.Tensor, rows: list[HandRow], padding: int = 1) -> list[list[float]]:
    """Gradients by row; those of padding must be exactly zero."""
    result, place = [], 0
    for row in rows:
        assert torch.count_nonzero(gradient[place : place + padding]) == 0
        result.append(gradient[place + padding : place + padding + row.length].tolist())
        place += padding + row.length
    return result


class Batch:
    """Counts over the trained rows."""

    def __init__(self, rows: list[HandRow], sft: float, off: float, ranks: int = 1) -> None:
        trained = [row for row in rows if row.weight]
        self.rows = {role: sum(row.role is role for row in trained) for role in Role}
        self.tokens = {role: sum(row.length for row in trained if row.role is role) for role in Role}
        self.all_rows, self.all_tokens = len(trained), sum(row.length for row in trained)
        self.sft, self.off, self.ranks = sft, off, ranks
        self.prompts = {role: {row.group for row in trained if row.role is role} for role in Role}

    def share(self, *roles: Role) -> float:
        """Prompts with rows of these roles, of all prompts."""
        return len(set().union(*(self.prompts[role] for role in roles))) / len(set().union(*self.prompts.values()))

    @property
    def rl_rows(self) -> int:
        return self.rows[Role.ROLLOUT]

    @property
    def rl_tokens(self) -> int:
        return self.tokens[Role.ROLLOUT]


def surrogate_loss(row: HandRow, t: int, low: float, high: float) -> tuple[float, float]:
    """PPO's clipped loss of a token and its slope."""
    ratio, a = math.exp(row.logprobs[t] - row.old[t]), row.advantage
    if a > 0 and ratio > 1 + high:
        return -a * (1 + high), 0.0
    if a < 0 and ratio < 1 - low:
        return -a * (1 - low), 0.0
    return -a * ratio, -a * ratio


def scaled(pair: tuple[float, float], by: float) -> tuple[float, float]:
    return pair[0] * by, pair[1] * by


def added(*pairs: tuple[float, float]) -> tuple[float, float]:
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def clipped(row: HandRow, t: int, n: float, low: float = 0.2, high: float = 0.2) -> tuple[float, float]:
    return scaled(surrogate_loss(row, t, low, high), 1 / n)


def unclipped(row: HandRow, t: int, n: float) -> tuple[float, float]:
    ratio = math.exp(row.logprobs[t] - row.old[t])
    return scaled((-row.advantage * ratio, -row.advantage * ratio), 1 / n)


def likelihood(row: HandRow, t: int, n: float) -> tuple[float, float]:
    return scaled((-row.logprobs[t], -1.0), 1 / n)


def shaped(row: HandRow, t: int, n: float) -> tuple[float, float]:
    p = math.exp(row.logprobs[t])
    return scaled((-row.advantage * p / (p + GAMMA), -row.advantage * GAMMA * p / (p + GAMMA) ** 2), 1 / n)


def sft(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return scaled(likelihood(row, t, b.tokens[Role.DEMONSTRATION]), b.sft)


def mean_entropy(row: HandRow) -> float:
    return sum(row.entropy) / row.length


def log_weighted(row: HandRow, t: int, n: float, advantage: float) -> tuple[float, float]:
    return scaled((-advantage * row.logprobs[t], -advantage), 1 / n)


def gspo(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    s = math.exp(sum(x - y for x, y in zip(row.logprobs, row.old, strict=True)) / row.length)
    fake = HandRow(row.role, 1.0, row.advantage, [math.log(s)], [0.0], [0.0], [0.0])
    return scaled(surrogate_loss(fake, 0, 3e-4, 4e-4), 1 / (b.rl_rows * row.length))


def cispo(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    weight = min(math.exp(row.logprobs[t] - row.old[t]), 5.0)
    return log_weighted(row, t, b.rl_tokens, weight * row.advantage)


def srft_rollout(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    a = row.advantage * (0.1 * math.exp(mean_entropy(row)) if row.advantage > 0 else 1.0)
    return log_weighted(row, t, b.all_rows * LENGTH, a)


def srft_demonstration(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    p = math.exp(row.logprobs[t])
    off = scaled((-row.advantage * p, -row.advantage * p), b.off / (b.all_rows * LENGTH))
    return added(scaled(sft(b, row, t), 0.5 * math.exp(-mean_entropy(row))), off)


def chord_demonstration(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    p = math.exp(row.logprobs[t])
    return scaled((-(p - p * p / 2), -(p - p * p)), b.sft / b.tokens[Role.DEMONSTRATION])


def nothing(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return 0.0, 0.0


def off_demonstration(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    rows = b.rows[Role.DEMONSTRATION] + b.rows[Role.OFF_POLICY]
    return scaled(shaped(row, t, rows * LENGTH), b.off * b.share(Role.DEMONSTRATION, Role.OFF_POLICY))


def hpt_rollout(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return scaled(unclipped(row, t, b.rl_rows * LENGTH), b.share(Role.ROLLOUT))


def hpt_demonstration(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return scaled(sft(b, row, t), b.share(Role.DEMONSTRATION))


def band_demonstration(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return scaled(shaped(row, t, b.rows[Role.OFF_POLICY] * LENGTH), b.off * b.share(Role.OFF_POLICY))


def grpo_rollout(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return clipped(row, t, b.rl_rows * row.length)


def reference_sft(b: Batch, row: HandRow, t: int) -> tuple[float, float]:
    return scaled(sft(b, row, t), 1 / b.ranks)


TABLE = {
    "sft": (nothing, sft),
    "reinforce": (lambda b, r, t: log_weighted(r, t, b.rl_rows, r.advantage), nothing),
    "rloo": (lambda b, r, t: log_weighted(r, t, b.rl_rows, r.advantage), nothing),
    "reinforce_pp": (lambda b, r, t: clipped(r, t, b.rl_tokens), nothing),
    "ppo": (lambda b, r, t: clipped(r, t, b.rl_tokens), nothing),
    "grpo": (grpo_rollout, nothing),
    "dr_grpo": (lambda b, r, t: clipped(r, t, b.rl_rows * LENGTH), nothing),
    "dapo": (lambda b, r, t: clipped(r, t, b.rl_tokens, 0.2, 0.28), nothing),
    "cispo": (cispo, nothing),
    "gspo": (gspo, nothing),
    "luffy": (lambda b, r, t: clipped(r, t, b.all_tokens), lambda b, r, t: scaled(shaped(r, t, b.all_tokens), b.off)),
    "srft": (srft_rollout, srft_demonstration),
    "hpt": (hpt_rollout, hpt_demonstration),
    "hpt_reference": (lambda b, r, t: unclipped(r, t, LENGTH * b.ranks), reference_sft),
    "off_on": (hpt_rollout, off_demonstration),
    "mix_on": (hpt_rollout, lambda b, r, t: added(hpt_demonstration(b, r, t), off_demonstration(b, r, t))),
    "sft_grpo": (grpo_rollout, sft),
    "chord": (grpo_rollout, chord_demonstration),
}
"""Name → loss and slope of a rollout's and of a demonstration's token."""


def by_hand(
    name: str,
    rows: list[HandRow],
    *,
    sft_coefficient: float = 1.0,
    off_coefficient: float = 1.0,
    entropy: float = 0.0,
    entropy_roles: tuple[Role, ...] = tuple(Role),
    kl: float = 0.0,
    ranks: int = 1,
) -> Hand:
    """The loss of a batch and its derivatives."""
    batch, hand = Batch(rows, sft_coefficient, off_coefficient, ranks), Hand()
    entropy_tokens = sum(row.length for row in rows if row.weight and row.role in entropy_roles)
    of_role = {Role.ROLLOUT: TABLE[name][0], Role.DEMONSTRATION: TABLE[name][1], Role.OFF_POLICY: band_demonstration}
    for row in rows:
        hand.logprobs.append([0.0] * row.length)
        hand.entropy.append([0.0] * row.length)
        for t in range(row.length if row.weight else 0):
            value, slope = scaled(of_role[row.role](batch, row, t), row.weight)
            if row.role in entropy_roles:
                share = entropy / entropy_tokens / (ranks if name == "hpt_reference" else 1)
                value -= share * row.entropy[t]
                hand.entropy[-1][t] = -share
            if kl and row.role is Role.ROLLOUT:
                d = row.logprobs[t] - row.reference[t]
                value += kl * (math.exp(-d) - 1 + d) / batch.rl_tokens
                slope += kl * (1 - math.exp(-d)) / batch.rl_tokens
            hand.loss += value
            hand.logprobs[-1][t] = slope
    return hand
