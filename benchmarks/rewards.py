"""The math reward in its pool beside math-verify called one answer after the other in one process.

    .venv/bin/python benchmarks/rewards.py [--workers 2] [--problems 400]

Ordinary answers: eight to a problem, half of them right, in the forms that test sets of competition problems have. Both sides
are timed in one run, in turns, the pool warm; a ratio above 1 means that the pool grades more answers a second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence

from math_verify import parse, verify

from megatron_hpt.config import RewardConfig
from megatron_hpt.rewards.pool import GraderPool

SAMPLES = 8
REASONING = "We substitute and find that the value must be positive, so the second root is left out. " * 20

FORMS: list[Callable[[int, int, int], tuple[str, list[str], list[str]]]] = [
    # from three small numbers to the ground truth, right answers and wrong ones; integers are the most frequent
    lambda a, b, c: (str(a * b + c), [str(a * b + c)], [str(a * b - c), str(a + b)]),
    lambda a, b, c: (str(a * c), [str(a * c), f"{a * c}.0"], [str(a * c + 1), str(-a * c)]),
    lambda a, b, c: (str(100 * a + b), [str(100 * a + b)], [str(100 * a + b + c), f"{a}"]),
    lambda a, b, c: (
        f"\\frac{{{a}}}{{{a + b}}}",
        [f"\\dfrac{{{a}}}{{{a + b}}}", f"{a}/{a + b}"],
        [f"\\frac{{{b}}}{{{a + b}}}", f"{a}"],
    ),
    lambda a, b, c: (
        f"{a}\\sqrt{{{b}}}",
        [f"\\sqrt{{{a * a * b}}}", f"{a} \\sqrt{{{b}}}"],
        [f"{a}\\sqrt{{{b + 1}}}", f"{a * b}"],
    ),
    lambda a, b, c: (f"({a}, {b})", [f"({a},{b})", f"\\left({a}, {b}\\right)"], [f"({b}, {a + 1})", f"({a}, {b + c})"]),
    lambda a, b, c: (f"x^2+{a}x+{b}", [f"{b}+{a}x+x^2", f"x^{{2}} + {a}x + {b}"], [f"x^2-{a}x+{b}", f"x^2+{b}x+{a + c}"]),
    lambda a, b, c: (f"{a}.{b}", [f"{a}.{b}0"], [f"{a + c}.{b}", f"{a}"]),
    lambda a, b, c: (
        f"\\frac{{{a}\\pi}}{{{b}}}",
        [f"\\frac{{{a} \\pi}}{{{b}}}", f"{a}\\pi/{b}"],
        [f"\\frac{{\\pi}}{{{b + c}}}", f"{a}\\pi"],
    ),
    lambda a, b, c: (f"{a}^\\circ", [f"{a}", f"{a}^{{\\circ}}"], [f"{a + c}^\\circ", f"{c}"]),
]


def answers(problems: int, reasoning: str, seed: int) -> list[tuple[str, str]]:
    """Responses and ground truths."""
    r = random.Random(seed)
    made = []
    for number in range(problems):
        truth, right, wrong = FORMS[number % len(FORMS)](r.randint(2, 60), r.randint(2, 60), r.randint(2, 60))
        for sample in range(SAMPLES):
            made.append((f"{reasoning}The answer is $\\boxed{{{r.choice(right if sample % 2 else wrong)}}}$.", truth))
    return made


def serially(given: Sequence[tuple[str, str]]) -> list[bool]:
    """math-verify as its documentation calls it."""
    return [verify(parse(f"${truth}$"), parse(response)) for response, truth in given]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--problems", type=int, default=400)
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    serially(answers(len(FORMS), "", 99))
    with GraderPool(RewardConfig(workers=chosen.workers)) as pool:
        for seed, (name, reasoning) in enumerate((("the box alone", ""), ("behind 340 words", REASONING))):
            given, ratios = answers(chosen.problems, reasoning, seed), []
            for turn in range(chosen.rounds):
                started = time.perf_counter()
                grades = asyncio.run(pool.grade(given))
                pooled, started = time.perf_counter() - started, time.perf_counter()
                verdicts = serially(given)
                serial = time.perf_counter() - started
                ratios.append(serial / pooled)
                if turn == 0:
                    rates = len(given) / pooled, len(given) / serial
                    differ = sum(grade.score != float(verdict) for grade, verdict in zip(grades, verdicts, strict=True))
            print(
                f"{name}: pool {rates[0]:.0f}/s on {chosen.workers} processes, math-verify {rates[1]:.0f}/s, "
                f"ratio {ratios[0]:.1f} at first sight, {statistics.median(ratios[1:]):.1f} when seen before; "
                f"{differ} of {len(given)} verdicts differ"
            )


if __name__ == "__main__":
    main()
