"""Who has to be ready before the first batch, and for how long it may take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.config import Config
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.errors import DeadlineError

PARTS = ("trainer", "coordinator")
"""They say themselves that they are ready; engines are asked."""


class Starting:
    """The start of one run, as the supervisor sees it."""

    def __init__(self, config: Config, board: Blackboard, logs: Path, step: int) -> None:
        """
        Args:
            logs: folder that a message points to.
            step: that the run starts from.
        """
        self._board, self._logs, self._step = board, logs, step
        self._seconds = config.deadlines.startup_s
        self._trainer_is_last = config.transfer.shares_gpus or config.rollout.sleep
        """It waits for engines on the same GPUs, and its time counts from then."""
        self._begun = time.monotonic()
        self._answered: float | None = None
        self._ready: set[str] = set()

    @property
    def announced(self) -> bool:
        """All engines have answered, and everybody knows where they are."""
        return self._answered is not None

    @property
    def over(self) -> bool:
        """All parts are ready: from here on the trainer hears a notice."""
        return self.announced and self._ready.issuperset(PARTS)

    def look(self, engines: Mapping[str, str]) -> str | None:
        """Announce the engines once all of them answer.

        Args:
            engines: URL → name.

        Returns:
            Who is waited for; None: nobody, weights are with the engines.

        Raises:
            DeadlineError: somebody is not ready within `deadlines.startup_s`; names everybody who is not.
        """
        waiting = [] if self.announced else [name for url, name in engines.items() if not is_healthy(url)]
        if not waiting and not self.announced:
            self._board.put("engines", list(engines))
            self._answered = time.monotonic()
        self._ready |= {part for part in PARTS if part not in self._ready and self._board.get(ready(part))}
        since = dict.fromkeys(waiting, self._begun) | {p: self._since(p) for p in PARTS if p not in self._ready}
        now = time.monotonic()
        late = [name for name, begun in since.items() if begun is not None and now - begun > self._seconds]
        if late:
            names, setting = ", ".join(late), f"{self._seconds:g} s (deadlines.startup_s)"
            raise DeadlineError(f"{names} not ready within {setting}; see {self._logs}")
        if since:
            return f"starting: {', '.join(since)} ({now - self._begun:.0f} s)"
        sent = self._board.get(f"published/{self._step}") is not None
        return None if sent else "the trainer sends its weights to the engines"

    def _since(self, part: str) -> float | None:
        """When its time began; None: it has not yet."""
        return self._answered if part == "trainer" and self._trainer_is_last else self._begun
