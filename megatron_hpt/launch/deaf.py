"""Servers that listen no more while their process lives on.

vLLM's does that when its engine process dies under a call: it stops listening and waits for the call, for ever (0.32:
entrypoints/launchers/launcher.py, watchdog_loop).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from megatron_hpt.listening import refuses

DEAF_S = 5.0
"""Seconds of refused connections after which a server is taken to be gone: most that stop listening end by themselves."""
GRACE_S = 3.0
"""Seconds between SIGTERM and SIGKILL for one: it had its time to end well."""
PERIOD_S = 1.0


class Deaf:
    """Looks at servers now and then."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._looked = 0.0

    def among(self, urls: Iterable[str]) -> list[str]:
        """Servers that have refused connections for too long; each is named once."""
        now = time.monotonic()
        if now - self._looked < PERIOD_S:
            return []
        self._looked = now
        self._since = {url: self._since.get(url, now) for url in urls if refuses(url)}
        found = [url for url, since in self._since.items() if now - since > DEAF_S]
        for url in found:
            del self._since[url]
        return found
