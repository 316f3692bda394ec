"""The start of a run: which parts have to be ready before the first batch, and how long each may take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from megatron_hpt.blackboard import Blackboard, ready
from megatron_hpt.config import Config
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.errors import DeadlineError

PARTS = ("trainer", "coordinator")
"""Parts that say on the blackboard that they are ready (`ready/<part>`); engines are asked."""


class Starting:
    """The start of one run; its supervisor calls `look` several times a second until the first step is done.

    Args:
        logs: folder that messages point to.
        step: step that the run starts from.
    """

    def __init__(self, config: Config, board: Blackboard, logs: Path, step: int) -> None:
        self._board, self._logs, self._step = board, logs, step
        self._seconds = config.deadlines.startup_s
        self._trainer_is_last = config.transfer.shares_gpus or config.rollout.sleep
        """Whether the trainer waits for engines on the same GPUs, so that its time counts from when they answer."""
        self._begun = time.monotonic()
        self._answered: float | None = None
        self._ready: set[str] = set()

    @property
    def announced(self) -> bool:
        """Whether all engines have answered and their URLs are on the blackboard (`engines`)."""
        return self._answered is not None

    @property
    def over(self) -> bool:
        """Whether all parts are ready; from here on the trainer hears a scheduler's notice."""
        return self.announced and self._ready.issuperset(PARTS)

    def look(self, engines: Mapping[str, str]) -> str | None:
        """Announce the engines once all of them answer, and say what is waited for.

        Args:
            engines: URL → name.

        Returns:
            A line for the display, or None once the engines have the weights.

        Raises:
            DeadlineError: a part is not ready within `deadlines.startup_s`; names every part that is not.
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
        """Return when a part's time began, or None if it has not begun yet."""
        return self._answered if part == "trainer" and self._trainer_is_last else self._begun
