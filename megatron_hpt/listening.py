"""Whether anybody listens at a server's address: the one thing that a dying server cannot get wrong.

A server may stop listening while its process lives on. vLLM's does that when its engine process dies under a call: it waits
for the call, for ever (0.32: entrypoints/launchers/launcher.py, watchdog_loop).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}


def refuses(url: str, seconds: float = 1.0) -> bool:
    """Connections to a server are refused. One that takes none for `seconds` may be busy: that is not a refusal."""
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[parts.scheme]), timeout=seconds).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


DEAF_S = 5.0
"""Seconds of refused connections after which a server is taken to be gone: most that stop listening end by themselves."""

GRACE_S = 3.0
"""Seconds between SIGTERM and SIGKILL for one: it had its time to end well."""

PERIOD_S = 1.0


class StoppedListening:
    """Finds servers that have refused connections for `DEAF_S`; looks at most once in `PERIOD_S`."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._looked = 0.0

    def among(self, urls: Iterable[str]) -> list[str]:
        """Return those of `urls` that have stopped listening; each is returned once. Called in a loop by whoever waits."""
        now = time.monotonic()
        if now - self._looked < PERIOD_S:
            return []
        self._looked = now
        self._since = {url: self._since.get(url, now) for url in urls if refuses(url)}
        found = [url for url, since in self._since.items() if now - since > DEAF_S]
        for url in found:
            del self._since[url]
        return found
