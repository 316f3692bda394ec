"""Evaluation folders as `megatron-hpt evaluate` leaves them, with samples drawn from known probabilities to solve a problem."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_hpt.evaluation.samples import (
    Evaluation,
    Protocol,
    SampleRow,
    SetRecord,
    samples_file,
    write_record,
    write_samples,
)

PROTOCOL = Protocol(temperature=0.6, top_p=0.95, max_tokens=8192, seed=0)


@dataclass(frozen=True)
class Drawn:
    """A benchmark: a probability a problem, and how often each is sampled."""

    probabilities: np.ndarray
    samples: int = 1
    level: Callable[[int], str | None] = lambda _: None
    name: Callable[[int], str] = str
    file: str = "problems.json"
    ungraded: int = 0
    """The first so many samples of the first problem."""


def write(
    folder: Path, model: str, benchmarks: Mapping[str, Drawn], seed: int = 0, step: int | None = None, **protocol
) -> Path:
    """An evaluation whose samples are drawn; wrong answers are one of three."""
    draws = np.random.default_rng(seed)
    for name, one in benchmarks.items():
        write_samples(
            samples_file(folder, name), [row for place in range(len(one.probabilities)) for row in _rows(one, place, draws)]
        )
    records = {name: _record(one) for name, one in benchmarks.items()}
    write_record(folder, Evaluation(model, "digest", replace(PROTOCOL, **protocol), records, step))
    return folder


def _record(one: Drawn) -> SetRecord:
    digest = hashlib.sha256(one.file.encode()).hexdigest()
    return SetRecord(one.file, digest, len(one.probabilities), one.samples, "math")


def _rows(one: Drawn, place: int, draws: np.random.Generator) -> list[SampleRow]:
    right = draws.random(one.samples) < one.probabilities[place]
    answers = [str(place) if ok else str(place + 1000 * (1 + draws.integers(3))) for ok in right]
    return [
        SampleRow(
            problem_id=one.name(place),
            sample=sample,
            seed=sample,
            data_source="math",
            level=one.level(place),
            prompt="?",
            response=rf"It is \boxed{{{answer}}}.",
            ground_truth=str(place),
            answer=answer,
            tokens=100 + 10 * sample,
            truncated=False,
            score=None if (lost := place == 0 and sample < one.ungraded) else float(ok),
            ungraded_reason="deadline" if lost else None,
            grader="math",
        )
        for sample, (answer, ok) in enumerate(zip(answers, right, strict=True))
    ]
