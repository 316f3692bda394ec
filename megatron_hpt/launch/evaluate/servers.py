"""Engines with the weights of a folder, for as long as an evaluation needs them."""

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
from megatron_hpt.launch.engines import Fleet, provide_token, start_engine
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.launch.scratch import Scratch

POLL_S = 0.5


class Servers:
    """`rollout.servers` engines; a context manager that ends them."""

    def __init__(self, config: Config, model: Path, folder: Path, gpus: Sequence[str]) -> None:
        """
        Args:
            model: Hugging Face folder.
            folder: for logs.
            gpus: what those of this machine are called; every engine gets `rollout.tensor_parallel` of them. None: engines run
                on the host.
        """
        self._config, self._model, self._folder, self._gpus = config, model, folder, gpus
        self._scratch = Scratch()
        self.fleet = Fleet()
        self._given_up: set[str] = set()

    @property
    def urls(self) -> list[str]:
        """Where they are."""
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
        """Return when all of them answer.

        Raises:
            EngineError: one died.
            DeadlineError: one is not ready within `deadlines.startup_s`.
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
        """Start engines again that die, listen no more or were given up, for ever: whoever needs them no longer cancels this.

        Raises:
            EngineError: more died than `rollout.max_restarts`.
        """
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        fleet = self.fleet
        fleet.returned()
        for url in {*fleet.silent(), *(self._given_up.pop() for _ in tuple(self._given_up))}:
            fleet.end(url)
        for url in fleet.dead():
            if fleet.restarts == self._config.rollout.max_restarts:
                self._fail_if_dead()
            fleet.restarts += 1
            fleet.start_again(url)

    def give_up(self, url: str) -> None:
        """End an engine that gives no sign of life; `watch` starts it again. Called by the pool of the clients."""
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
