"""The engine servers that a process starts, for a run or for an evaluation: started, watched, ended and started again."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.listening import GRACE_S, StoppedListening
from megatron_hpt.process import TOKEN_VARIABLE, token


def start_engine(
    config: Config,
    index: int,
    start: Start,
    log: Path,
    variables: Mapping[str, str],
    around: Callable[[list[str]], list[str]] = list,
) -> tuple[str, Child]:
    """Start one server, and return its URL and its process.

    Args:
        config: `rollout.host` is the address that the server listens on.
        index: number that messages name the server by.
        variables: environment variables beside those that the engine wants.
        around: turns the engine's command line into the one that is run, e.g. by an srun before it.

    Raises:
        ConfigError: the engine's environment is missing.
    """
    kind = engine_of(config)
    command = around(kind.command(config, interpreter(config), start))
    environment = {**kind.environment(config, start.on_gpus), **variables}
    return f"http://{config.rollout.host}:{start.port}", Child.start(f"engine {index}", command, log, environment)


def provide_token() -> None:
    """Make the run's token, which every process that this one starts inherits, unless the user has set one for servers of
    their own."""
    os.environ[TOKEN_VARIABLE] = token() or secrets.token_urlsafe(24)


class Fleet(dict[str, Child]):
    """URL → process of every server. A dead one keeps its URL, and is started again there by the same command."""

    def __init__(self) -> None:
        super().__init__()
        self.restarts = 0
        """Restarts so far, those that have yet to be carried out included."""
        self.waiting: list[str] = []
        """URLs of dead servers that wait for `start_again`, in the order in which they died."""
        self.returning: dict[str, float] = {}
        """URL of a server that was started again and does not answer yet → when it was started."""
        self._stopped_listening = StoppedListening()

    def start(self, servers: int, start: Callable[[int], tuple[str, Child]]) -> None:
        """Start servers 0 to `servers` - 1; those before one that cannot be started are in the fleet, for whoever ends it."""
        for index in range(servers):
            url, child = start(index)
            self[url] = child

    @property
    def names(self) -> dict[str, str]:
        """URL → name in messages."""
        return {url: child.name for url, child in self.items()}

    @property
    def serving(self) -> list[str]:
        """URLs of the servers that neither wait for a restart nor have yet to answer after one."""
        return [url for url in self if url not in self.returning and url not in self.waiting]

    def not_listening(self) -> list[str]:
        """Return the URLs of serving servers that have stopped listening, each once. Called in a loop."""
        return self._stopped_listening.among(self.serving)

    def end(self, url: str) -> None:
        """End a server that serves no more; it is then among the `dead`."""
        stop_all([self[url]], grace_s=GRACE_S)

    def dead(self) -> list[str]:
        """Return the URLs of servers whose processes have ended, but for those in `waiting`."""
        return [url for url, child in self.items() if child.exit_code is not None and url not in self.waiting]

    def start_again(self, url: str) -> None:
        """Start a dead server again, after what is left of it has been ended."""
        self[url] = self[url].again()
        self.returning[url] = time.monotonic()

    def returned(self) -> dict[str, float]:
        """Return the servers that answer for the first time after a restart → seconds since then. Called in a loop."""
        answering = {url: time.monotonic() - since for url, since in self.returning.items() if is_healthy(url)}
        for url in answering:
            del self.returning[url]
        return answering

    @property
    def history(self) -> str:
        """The end of a message about dead servers: how often servers had been started again."""
        return f"\nengines had been started again {self.restarts} times" if self.restarts else ""
