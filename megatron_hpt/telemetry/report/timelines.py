"""Timelines: the ways of single prompts through a run, from state to state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hpt.telemetry.report.visits import State, Visit, evenly

_MOST_PROMPTS = 150
_MOST_SEGMENTS = 2_000


@dataclass(frozen=True)
class TimelineSegment:
    """A time in which a prompt stands in one state."""

    start: int
    end: int
    """The first step that does not belong to it."""
    state: State
    visits: int
    solved: int
    graded: int
    """This and `solved` count the answers of the last visit in the segment."""


@dataclass(frozen=True)
class Timeline:
    """A prompt's way through the run."""

    prompt_id: str
    segments: Sequence[TimelineSegment]


@dataclass(frozen=True)
class Timelines:
    """The timelines of some prompts, those that were solved first before the others."""

    shown: Sequence[Timeline]
    prompts: int
    """Prompts that the run has seen."""
    repeated: int
    """Prompts that it has seen more than once."""


def timelines(visits: Sequence[Visit], most: int = _MOST_PROMPTS) -> Timelines:
    """Make timelines of at most `most` prompts, evenly chosen from those visited more than once, or from all if none was."""
    by_prompt: dict[str, list[Visit]] = defaultdict(list)
    for visit in visits:
        by_prompt[visit.prompt_id].append(visit)
    repeated = [prompt for prompt, visits_of in by_prompt.items() if len(visits_of) > 1]
    end = visits[-1].step + 1 if visits else 0
    chosen = [Timeline(prompt, _segments(by_prompt[prompt], end)) for prompt in evenly(repeated or list(by_prompt), most)]
    total = sum(len(timeline.segments) for timeline in chosen)
    shown = evenly(chosen, max(1, len(chosen) * _MOST_SEGMENTS // max(_MOST_SEGMENTS, total)))
    return Timelines(sorted(shown, key=_way), len(by_prompt), len(repeated))


def _segments(visits: Sequence[Visit], end: int) -> list[TimelineSegment]:
    segments: list[TimelineSegment] = []
    for visit, until in zip(visits, [*(later.step for later in visits[1:]), end], strict=True):
        if until == visit.step:
            continue  # the prompt occurs again in this step
        last = segments[-1] if segments else None
        if last and last.state is visit.state:
            segments[-1] = TimelineSegment(last.start, until, last.state, last.visits + 1, visit.solved, visit.graded)
        else:
            segments.append(TimelineSegment(visit.step, until, visit.state, 1, visit.solved, visit.graded))
    return segments


def _way(timeline: Timeline) -> tuple[int, ...]:
    """Return what prompts are sorted by: from when on it stays solved, when it leaves SFT, and when it is first seen."""
    segments = timeline.segments
    late = segments[-1].end + 1
    solved = segments[-1].start if segments[-1].state is State.SOLVED else late
    left = next((segment.start for segment in segments if segment.state is not State.SFT), late)
    return solved, left, segments[0].start
