"""What the estimator sees of a batch: flat tokens, each with its row, and what every row is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_hpt.objective.roles import Role


@dataclass(frozen=True)
class Tokens:
    """The tokens of some rows, flat; all fields are [tokens]. Positions that are not trained have weight 0."""

    logprobs: Tensor
    """log π_θ, differentiable."""
    entropy: Tensor
    """Entropy of π_θ at each position in nats, differentiable."""
    behaviour_logprobs: Tensor
    """log π of whoever wrote the token: the engine on rollouts, a teacher on demonstrations where it is known, else 0."""
    advantages: Tensor
    """Â, estimated from rewards."""
    weights: Tensor
    """The row's weight on response tokens, 0 elsewhere."""
    row_lengths: Tensor
    """Response length of the token's row, as a float."""
    rows: Tensor
    """int64: index of the token's row among the rows given here."""
    roles: Tensor
    """int64: `Role` of the token's row."""
    reference_logprobs: Tensor | None = None
    """log π of the frozen reference model; None without a KL term."""
    old_logprobs: Tensor | None = None
    """log π of the trainer's weights when the batch arrived, where these are π_θold; None where the engine's are."""

    @property
    def trained(self) -> Tensor:
        """bool: has a weight."""
        return self.weights != 0

    def of(self, roles: Iterable[Role]) -> Tensor:
        """bool: trained tokens of some roles."""
        member = torch.zeros_like(self.roles, dtype=torch.bool)
        for role in roles:
            member |= self.roles == role
        return member & self.trained

    def row_mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the trained tokens of each token's row, [tokens], differentiable.

        Rows lie whole in one batch part, so this needs no communication.
        """
        # There are at most as many rows as tokens; asking for their number would make the host wait for the device.
        zeros = torch.zeros_like(values)
        sums = zeros.index_add(0, self.rows, torch.where(self.trained, values, 0.0))
        counts = zeros.index_add(0, self.rows, self.trained.to(values.dtype)).clamp(min=1)
        return (sums / counts)[self.rows]


@dataclass(frozen=True)
class Counts:
    """Trained response tokens and rows, in the whole batch."""

    tokens: int = 0
    rows: int = 0
    ranks: int = 1
    """Data parallel ranks; only the reference's as-run means depend on it."""
    prompt_share: float = 1.0
    """Prompts that these rows are of, as a share of all trained prompts."""


@dataclass(frozen=True)
class Denominators:
    """Global counts by role, over all micro-batches and ranks, made before the first forward."""

    by_role: Mapping[Role, Counts]
    ranks: int = 1
    prompts: Mapping[Role, frozenset[int]] = field(default_factory=dict)
    """The prompts (groups) that have trained rows of a role."""

    def of(self, roles: Iterable[Role]) -> Counts:
        """Counts of some roles together."""
        roles = list(roles)
        counts = [self.by_role.get(role, Counts()) for role in roles]
        some, everyone = self._prompts(roles), self._prompts(Role)
        share = some / everyone if everyone else 1.0
        return Counts(sum(c.tokens for c in counts), sum(c.rows for c in counts), self.ranks, share)

    def _prompts(self, roles: Iterable[Role]) -> int:
        return len(frozenset().union(*(self.prompts.get(role, frozenset()) for role in roles)))

    @property
    def tokens(self) -> int:
        """All trained response tokens."""
        return self.of(Role).tokens

    @property
    def rows(self) -> int:
        """All trained rows."""
        return self.of(Role).rows


def count(rows: Iterable[tuple[Role, int, int, float]], ranks: int = 1) -> Denominators:
    """Count the whole batch.

    Args:
        rows: role, prompt (group), response length and weight of each row; weight 0 is not trained.
        ranks: data parallel ranks that share the batch.
    """
    tokens, number = dict.fromkeys(Role, 0), dict.fromkeys(Role, 0)
    prompts: dict[Role, set[int]] = {role: set() for role in Role}
    for role, group, length, weight in rows:
        if weight != 0:
            tokens[role] += length
            number[role] += 1
            prompts[role].add(group)
    by_role = {role: Counts(tokens[role], number[role]) for role in Role}
    return Denominators(by_role, ranks, {role: frozenset(groups) for role, groups in prompts.items()})
