"""Which cores the ranks of a host engine use, and how many."""

from __future__ import annotations

import os


def threads_of_one_rank() -> str:
    """Threads of an engine of one rank: one core is left to its server, as vLLM leaves it (utils/ompmultiprocessing.py)."""
    return str(max(1, len(os.sched_getaffinity(0)) - 1))


def cores_of_ranks(ranks: int) -> str:
    """The cores of this process shared out, as vLLM and SGLang want it: ``0-3|4-7``. Ranks beyond the cores share them."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // ranks)
    shares = [cores[rank * each % len(cores) :][:each] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)
