"""The gate's decisions of a run, read from its ledger, and what they tell: by source, by difficulty, over the steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.errors import DataError
from megatron_hpt.objective.gate import Choice

MOST_DECISIONS = 300_000
"""Decisions that are read; of a longer run's ledger only every second, third … step is read."""
_MOST_BINS = 60
DIFFICULTIES = ("never solved", "up to 25 % solved", "25 to 50 % solved", "50 to 75 % solved", "75 to 100 % solved")


class State(StrEnum):
    """Where a prompt stands after a visit."""

    SFT = "taught by SFT"
    OFF_POLICY = "off-policy RL"
    BOTH = "SFT and RL"
    RL = "RL"
    SOLVED = "solved"
    SKIPPED = "skipped"


_STATES = {
    Choice.DEMONSTRATION: State.SFT,
    Choice.OFF_POLICY: State.OFF_POLICY,
    Choice.BOTH: State.BOTH,
    Choice.ROLLOUTS: State.RL,
    Choice.SKIPPED: State.SKIPPED,
}


@dataclass(frozen=True, slots=True)
class Visit:
    """One decision of the gate."""

    step: int
    group: int
    """Index of the prompt in the step."""
    prompt_id: str
    source: str
    choice: Choice
    solved: int
    graded: int
    rollout_weight: float
    demonstration_weight: float

    @property
    def state(self) -> State:
        """Where the prompt stands; solved if all graded answers are right and it learns not from its demonstration alone."""
        if 0 < self.graded == self.solved and self.choice is not Choice.DEMONSTRATION:
            return State.SOLVED
        return _STATES[self.choice]

    @property
    def demonstration_share(self) -> float | None:
        """The demonstration's share of the weight, β / (α + β); None if nothing was trained."""
        total = self.rollout_weight + self.demonstration_weight
        return self.demonstration_weight / total if total else None


@dataclass(frozen=True)
class Visits:
    """Decisions in the order of the steps."""

    all: Sequence[Visit]
    every: int
    """One of so many steps was read."""
    unreadable: Sequence[str] = ()
    """Messages about batches that could not be read."""


def read(ledger: Ledger) -> Visits:
    """Read the decisions of the ledger, at most about `MOST_DECISIONS`; damaged batches are left out, with a message each."""
    steps, visits, unreadable = ledger.steps(), [], []
    every = 1
    for index, step in enumerate(steps):
        if index % every:
            continue
        try:
            decisions = ledger.read_meta(step)[0]
        except DataError as error:
            unreadable.append(str(error))
            continue
        visits += [_visit(step, group, decision) for group, decision in enumerate(decisions)]
        if not index:
            every = max(1, -(-len(steps) * len(decisions) // MOST_DECISIONS))
    return Visits(visits, every, unreadable)


def _visit(step: int, group: int, decision: dict[str, Any]) -> Visit:
    return Visit(
        step,
        group,
        decision["prompt_id"],
        decision["data_source"],
        Choice(decision["choice"]),
        decision["solved"],
        decision["graded"],
        decision["rollout_weight"],
        decision["demonstration_weight"],
    )


Shares = dict[str, list[tuple[int, float]]]
"""Name → (step, share)."""


def by_source(visits: Sequence[Visit], most: int = 6) -> Shares:
    """Return the SFT share of the most frequent data sources, and of all others together."""
    frequent = [name for name, _ in Counter(visit.source for visit in visits).most_common()]
    kept = set(frequent if len(frequent) <= most + 1 else frequent[:most])
    shares = _shares(visits, lambda visit: (visit.source or "(no source)") if visit.source in kept else "all others")
    return {name: shares[name] for name in sorted(shares, key=lambda name: (name == "all others", name))}


def by_difficulty(visits: Sequence[Visit]) -> Shares:
    """Return the SFT share by how often prompts were solved in the whole run, hardest first, without those never graded."""
    solved, graded = Counter(), Counter()
    for visit in visits:
        solved[visit.prompt_id] += visit.solved
        graded[visit.prompt_id] += visit.graded
    known = [visit for visit in visits if graded[visit.prompt_id]]
    shares = _shares(known, lambda visit: _difficulty(solved[visit.prompt_id], graded[visit.prompt_id]))
    return {name: shares[name] for name in DIFFICULTIES if name in shares}


def _difficulty(solved: int, graded: int) -> str:
    return DIFFICULTIES[-(-4 * solved // graded)]


def _shares(visits: Sequence[Visit], name: Callable[[Visit], str]) -> Shares:
    """Average β / (α + β) over the visits that train, by name and in groups of consecutive steps."""
    binned = _bins(visits)
    sums: dict[tuple[str, int], list[float]] = defaultdict(list)
    for visit in visits:
        share = visit.demonstration_share
        if share is not None:
            sums[name(visit), binned[visit.step]].append(share)
    shares: Shares = defaultdict(list)
    for (key, step), values in sorted(sums.items()):
        shares[key].append((step, sum(values) / len(values)))
    return shares


def _bins(visits: Sequence[Visit]) -> dict[int, int]:
    """Group consecutive steps into at most `_MOST_BINS` bins; return step → last step of its bin."""
    steps = sorted({visit.step for visit in visits})
    width = max(1, -(-len(steps) // _MOST_BINS))
    return {step: steps[min(index - index % width + width, len(steps)) - 1] for index, step in enumerate(steps)}


def population(visits: Sequence[Visit]) -> Iterator[tuple[int, dict[State, float]]]:
    """Yield for each group of steps its last step, and the share of the prompts seen so far that then stand in each state."""
    binned, states, counts = _bins(visits), {}, Counter()
    for index, visit in enumerate(visits):
        counts[states.get(visit.prompt_id)] -= 1
        states[visit.prompt_id] = visit.state
        counts[visit.state] += 1
        if index + 1 == len(visits) or binned[visits[index + 1].step] != binned[visit.step]:
            yield binned[visit.step], {state: counts[state] / len(states) for state in State if counts[state] > 0}


def transitions(visits: Sequence[Visit]) -> Counter[tuple[State, State]]:
    """Count (state at a visit, state of the same prompt at its next visit)."""
    last: dict[str, State] = {}
    counted: Counter[tuple[State, State]] = Counter()
    for visit in visits:
        if visit.prompt_id in last:
            counted[last[visit.prompt_id], visit.state] += 1
        last[visit.prompt_id] = visit.state
    return counted


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Choose at most `most` items at equal distances, the first and the last among them; of one, the last."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
