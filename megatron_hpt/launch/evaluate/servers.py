"""The engine servers of an evaluation, which serve the weights of a folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.engines.types import Weights
from megatron_hpt.environment import say_what_is_withheld
from megatron_hpt.errors import DeadlineError, EngineError
from megatron_hpt.launch.children import Child, failure_of, stop_all
from megatron_hpt.launch.engine_fleet import Fleet, provide_token, start_engine
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.launch.scratch import Scratch

POLL_S = 0.5


class Servers:
    """A context manager that starts `rollout.servers` engines when it is entered, and ends them when it is left.

    Args:
        model: Hugging Face folder.
        folder: folder for the engines' logs.
        gpus: names of this machine's GPUs (`gpus_here`), of which every engine gets `rollout.tensor_parallel`; without any,
            engines run on the host.
    """

    def __init__(self, config: Config, model: Path, folder: Path, gpus: Sequence[str]) -> None:
        self._config, self._model, self._folder, self._gpus = config, model, folder, gpus
        self._scratch = Scratch()
        self.fleet = Fleet()
        self._given_up: set[str] = set()

    @property
    def urls(self) -> list[str]:
        """URLs of the servers, in the order of their numbers."""
        return list(self.fleet)

    def __enter__(self) -> Servers:
        self._folder.mkdir(parents=True, exist_ok=True)
        say_what_is_withheld()
        provide_token()  # what the engines inherit and their clients send
        try:
            self.fleet.start(self._config.rollout.servers, self._start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        stop_all(list(self.fleet.values()))
        self._scratch.close()

    def wait(self, status: Callable[[str], None]) -> None:
        """Return when all servers answer; called before `watch`.

        Args:
            status: called with a line for the display.

        Raises:
            EngineError: a server died.
            DeadlineError: a server is not ready within `deadlines.startup_s`.
        """
        started = time.monotonic()
        while waiting := [name for url, name in self.fleet.names.items() if not is_healthy(url)]:
            self._fail_if_dead()
            waited = time.monotonic() - started
            if waited > self._config.deadlines.startup_s:
                raise DeadlineError(
                    f"{', '.join(waiting)} not ready within {waited:.0f} s (deadlines.startup_s); see {self._folder}"
                )
            status(f"starting: {', '.join(waiting)} ({waited:.0f} s)")
            time.sleep(POLL_S)

    async def watch(self) -> None:
        """Start servers again that die, stop listening or were given up; runs until it is cancelled.

        Raises:
            EngineError: a server died that `rollout.max_restarts` does not allow to be started again.
        """
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        fleet = self.fleet
        fleet.returned()
        for url in {*fleet.not_listening(), *(self._given_up.pop() for _ in tuple(self._given_up))}:
            fleet.end(url)
        for url in fleet.dead():
            if fleet.restarts == self._config.rollout.max_restarts:
                self._fail_if_dead()
            fleet.restarts += 1
            fleet.start_again(url)

    def give_up(self, url: str) -> None:
        """Have `watch` end a server that gives no sign of life, and start it again. Called by the pool of the clients."""
        self._given_up.add(url)

    def _fail_if_dead(self) -> None:
        failures = [str(failure_of(self.fleet[url], self._folder)) for url in self.fleet.dead()]
        if failures:
            raise EngineError("\n".join(failures) + self.fleet.history)

    def _start(self, index: int) -> tuple[str, Child]:
        config, port = self._config, free_port(self._config.rollout.host)
        start = Start(str(self._model), port, self._scratch.path, on_gpus=bool(self._gpus), weights=Weights.FOLDER)
        variables = {**self._scratch.environment, **self._devices(index)}
        return start_engine(config, index, start, self._folder / f"engine_{index}.log", variables)

    def _devices(self, index: int) -> dict[str, str]:
        if not self._gpus:
            return {}
        width = self._config.rollout.tensor_parallel
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[index * width : (index + 1) * width])}
