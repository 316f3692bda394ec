"""Cut a batch into the parts that one optimizer step each trains, and order these: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hpt.objective.roles import Role


def split(groups: Sequence[int], costs: Sequence[float], roles: Sequence[Role | None], updates: int) -> list[list[int]]:
    """Cut the rows of a batch into parts of equal cost; all rows of a group (a prompt) go to the same part.

    The kind of a group is the set of the roles that it trains. Parts differ by at most one in their number of groups of any
    kind, so each has its share of the demonstrations, and in their costs by at most that of the dearest group.

    Args:
        groups: of each row.
        costs: of each row, above 0.
        roles: of each row, or None where it does not train.
        updates: number of parts that is wanted.

    Returns:
        For each part the indices of its rows, rising. There are fewer parts than wanted where fewer groups train anything,
        since none of them is without such a group; where nothing trains there is one part.
    """
    cost: dict[int, float] = {}
    kinds: dict[int, set[Role]] = {}
    for group, row_cost, role in zip(groups, costs, roles, strict=True):
        cost[group] = cost.get(group, 0.0) + row_cost
        kinds.setdefault(group, set()).update([] if role is None else [role])
    parts = max(1, min(updates, sum(map(bool, kinds.values()))))
    loads, part_of = [0.0] * parts, dict[int, int]()
    # Groups that train nothing come last: then every part that has a group has one that trains.
    for kind in sorted({frozenset(kind) for kind in kinds.values()}, key=lambda kind: (not kind, sorted(kind))):
        dearest_first = sorted((group for group in kinds if kinds[group] == kind), key=lambda group: (-cost[group], group))
        for start in range(0, len(dearest_first), parts):
            # A round gives every part one group, the dearest to that with the least to do. Two loads whose difference was d
            # then differ by d less the difference of their groups, so by no more than before, or than the dearest group costs.
            least_first = sorted(range(parts), key=lambda part: (loads[part], part))
            for part, group in zip(least_first, dearest_first[start : start + parts], strict=False):  # the last round is short
                part_of[group] = part
                loads[part] += cost[group]
    return [[row for row, group in enumerate(groups) if part_of[group] == part] for part in range(parts)]


def order(parts: int, seed: int, step: int, epoch: int) -> list[int]:
    """Draw the order in which a pass over the batch of a step takes its parts; the same for the same arguments."""
    return np.random.default_rng((seed, step, epoch)).permutation(parts).tolist()
