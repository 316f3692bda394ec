"""The layout of the results table of arXiv 2509.04419, and the figures that it reports there (tables 2 and 3)."""

from __future__ import annotations

import re

MATHEMATICS = ("AIME24", "AIME25", "AMC", "MATH-500", "Minerva", "Olympiad")
GENERAL = ("ARC-c", "GPQA")
"""Each group is followed by its average."""
AMC_PROBLEMS = 83
"""The paper's AMC has so many: AMC12 of 2022 and 2023. The set called AMC23 has 40."""

_COLUMNS = {
    **{re.sub(r"\W", "", title).lower(): title for title in (*MATHEMATICS, *GENERAL)},
    **{"amc23": "AMC", "minervamath": "Minerva", "olympiadbench": "Olympiad", "arcchallenge": "ARC-c", "gpqadiamond": "GPQA"},
}


def column_of(benchmark: str) -> str:
    """Return the column of a benchmark: the paper's title for it, or its own name."""
    return _COLUMNS.get(re.sub(r"[\W_]", "", benchmark).lower(), benchmark)


def rows(model: str) -> dict[str, dict[str, float]]:
    """Return what the paper reports for a model: run → column → accuracy in [0, 1].

    Raises:
        KeyError: it does not report that model.
    """
    return {
        name: {column: value / 100 for column, value in zip((*MATHEMATICS, *GENERAL), values, strict=False)}
        for name, values in TABLES[model].items()
    }


TABLES: dict[str, dict[str, tuple[float, ...]]] = {
    "Qwen2.5-Math-7B": {
        "Qwen2.5-Math-7B": (12.3, 4.7, 33.0, 43.6, 8.8, 13.6, 30.9, 28.3),
        "SFT": (25.1, 22.8, 56.1, 84.2, 33.8, 44.7, 67.4, 25.3),
        "GRPO": (19.4, 13.8, 59.1, 81.8, 38.2, 46.2, 81.2, 36.4),
        "SFT→GRPO": (25.7, 21.6, 62.2, 84.6, 38.2, 46.8, 67.7, 30.8),
        "LUFFY": (26.1, 21.8, 66.2, 88.4, 41.9, 54.1, 80.8, 39.4),
        "SRFT": (18.4, 15.5, 55.9, 83.8, 42.6, 48.9, 80.5, 36.8),
        "HPT": (33.0, 21.9, 69.4, 89.2, 46.0, 56.9, 81.6, 42.9),
        "Qwen2.5-Math-7B-Instruct": (11.8, 9.8, 48.3, 83.2, 34.2, 39.3, 72.7, 29.3),
        "PRIME-Zero*": (17.0, 12.8, 54.0, 81.4, 39.0, 40.3, 73.3, 18.2),
        "SimpleRL-Zero*": (27.0, 6.8, 54.9, 76.0, 25.0, 34.7, 30.2, 23.2),
        "OpenReasoner-Zero*": (16.5, 15.0, 52.1, 82.4, 33.1, 47.1, 66.2, 29.8),
        "Oat-Zero*": (33.4, 11.9, 61.2, 78.0, 34.6, 43.4, 70.1, 23.7),
    },
    "Qwen2.5-Math-1.5B": {
        "Qwen2.5-Math-1.5B": (2.8, 6.1, 24.5, 32.8, 11.0, 16.4),
        "SFT": (14.7, 17.6, 45.4, 78.4, 29.4, 35.7),
        "GRPO": (12.2, 8.5, 43.8, 71.0, 33.1, 35.3),
        "LUFFY": (14.1, 9.4, 43.5, 75.2, 26.1, 39.7),
        "HPT": (16.6, 17.8, 51.0, 81.0, 37.5, 47.3),
    },
    "Llama-3.1-8B": {
        "Llama-3.1-8B": (0.4, 0.1, 4.7, 13.8, 4.8, 3.9),
        "SFT*": (0.5, 0.1, 5.4, 20.2, 4.0, 5.3),
        "GRPO*": (0.3, 0.5, 9.4, 23.4, 17.6, 6.1),
        "LUFFY*": (1.9, 0.1, 13.5, 39.0, 15.1, 9.6),
        "HPT": (2.1, 1.2, 18.6, 47.8, 18.8, 20.4),
    },
}
"""Model → run → accuracies in percent. * : the paper took them from other papers."""
