"""How often 95% intervals of avg@k hold the true accuracy: this project's beside the normal one, on the same samples.

    .venv/bin/python benchmarks/intervals.py

Problems are drawn from a distribution of difficulty, each is answered k times, 10,000 times over.
"""

import math
from collections.abc import Callable

import numpy as np

from megatron_hpt.evaluation.statistics import interval

TRIALS = 10_000
DIFFICULTIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "mostly hard, mean 0.05": lambda draws, n: draws.beta(0.1, 2.0, n),
    "spread, mean 0.33": lambda draws, n: draws.beta(0.3, 0.6, n),
    "mostly easy, mean 0.87": lambda draws, n: draws.beta(2.0, 0.3, n),
}


def normal(values: np.ndarray) -> tuple[float, float]:
    """Mean ± 1.96 standard errors over problems."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    return values.mean() - half, values.mean() + half


def main() -> None:
    print("| problems | k | difficulty | ours covers | width | normal covers | width |\n|---|---|---|---|---|---|---|")
    for problems, k in ((30, 1), (30, 32), (198, 1), (500, 1)):
        for name, difficulty in DIFFICULTIES.items():
            draws = np.random.default_rng(0)
            truth = difficulty(draws, 1_000_000).mean()
            samples = [draws.binomial(k, difficulty(draws, problems)) / k for _ in range(TRIALS)]
            cells = [cell for kind in (interval, normal) for cell in coverage(samples, kind, truth)]
            print(f"| {problems} | {k} | {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


def coverage(samples: list[np.ndarray], kind: Callable[[np.ndarray], tuple[float, float]], truth: float) -> tuple[float, float]:
    """Share of intervals that hold the truth, and their mean width."""
    ends = np.array([kind(values) for values in samples])
    return float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()), float((ends[:, 1] - ends[:, 0]).mean())


if __name__ == "__main__":
    main()
