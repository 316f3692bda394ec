"""What every process of a run does first."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hpt.errors import HptError
from megatron_hpt.space import in_words

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
TOKEN_VARIABLE = "HPT_TOKEN"
"""Environment variable with the token that the run's servers ask for."""
CORES_VARIABLE = "HPT_CORES"
"""Environment variable with the cores that a part of a run keeps to, e.g. ``0,1``; unset: all that it inherits."""


def token() -> str | None:
    """The run's token; None: its servers ask for none."""
    return os.environ.get(TOKEN_VARIABLE) or None


def token_header() -> dict[str, str]:
    """What a client of the run's servers sends with every request."""
    own = token()
    return {"Authorization": f"Bearer {own}"} if own else {}


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, however it dies: no orphan outlives its run."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def log_to(path: Path) -> None:
    """Send this process's output and log records, and those of its children, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def keep_to_cores() -> None:
    """Have this process, and those that it starts, run on the cores that its launcher has chosen (`CORES_VARIABLE`) alone."""
    if chosen := os.environ.get(CORES_VARIABLE):
        os.sched_setaffinity(0, map(int, chosen.split(",")))


@contextmanager
def ends_in_words(folder: Path) -> Iterator[None]:
    """End the process with an error of ours in words; a traceback is for all others.

    Args:
        folder: where it writes.
    """
    try:
        with in_words(folder):
            yield
    except HptError as error:
        logger.error("%s", error)
        sys.exit(error.EXIT_CODE)


def main() -> None:
    """``python -m megatron_hpt.process LOG COMMAND…``: become COMMAND, tied to the parent's life, logging to LOG."""
    die_with_parent()
    log_to(Path(sys.argv[1]))
    keep_to_cores()
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
