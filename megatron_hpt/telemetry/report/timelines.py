"""The ways of single prompts through a run: from state to state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hpt.telemetry.report.visits import State, Visit, evenly

_MOST_PROMPTS = 150
_MOST_SEGMENTS = 2_000


@dataclass(frozen=True)
class TimelineSegment:
    """A prompt stands in a state from a step on, until another."""

    start: int
    end: int
    state: State
    visits: int
    solved: int
    graded: int
    """Of its last visit in the segment."""


@dataclass(frozen=True)
class Timeline:
    """A prompt's way through the run."""

    prompt_id: str
    segments: Sequence[TimelineSegment]


@dataclass(frozen=True)
class Timelines:
    """Some prompts, those that were solved first before."""

    shown: Sequence[Timeline]
    prompts: int
    """That the run has seen."""
    repeated: int
    """That it has seen more than once."""


def timelines(visits: Sequence[Visit], most: int = _MOST_PROMPTS) -> Timelines:
    """Ways of at most `most` prompts, evenly chosen of those that were visited more than once (of all, if none was)."""
    by_prompt: dict[str, list[Visit]] = defaultdict(list)
    for visit in visits:
        by_prompt[visit.prompt_id].append(visit)
    repeated = [prompt for prompt, own in by_prompt.items() if len(own) > 1]
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
    """What prompts are sorted by: when one stays solved, when it leaves SFT, when it is first seen."""
    segments = timeline.segments
    late = segments[-1].end + 1
    solved = segments[-1].start if segments[-1].state is State.SOLVED else late
    left = next((segment.start for segment in segments if segment.state is not State.SFT), late)
    return solved, left, segments[0].start
