"""Engines with the weights of a folder, for as long as an evaluation needs them."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hpt.config import Config
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import engine_of, interpreter
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.engines.types import Weights
from megatron_hpt.environment import say_what_is_withheld
from megatron_hpt.errors import DeadlineError, EngineError
from megatron_hpt.launch.children import Child, failure_of, stop_all
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.launch.scratch import Scratch
from megatron_hpt.listening import GRACE_S, StoppedListening
from megatron_hpt.process import TOKEN_VARIABLE, token

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
        self._children: dict[str, Child] = {}
        self._restarted = 0
        self._deaf, self._silent = StoppedListening(), set[str]()

    @property
    def urls(self) -> list[str]:
        """Where they are."""
        return list(self._children)

    def __enter__(self) -> Servers:
        self._folder.mkdir(parents=True, exist_ok=True)
        say_what_is_withheld()
        os.environ[TOKEN_VARIABLE] = token() or secrets.token_urlsafe(24)  # what the engines inherit and their clients send
        try:
            for index in range(self._config.rollout.servers):
                self._start(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        stop_all(list(self._children.values()))
        self._scratch.close()

    def wait(self, status: Callable[[str], None]) -> None:
        """Return when all of them answer.

        Raises:
            EngineError: one died.
            DeadlineError: one is not ready within `deadlines.startup_s`.
        """
        started = time.monotonic()
        while waiting := [child.name for url, child in self._children.items() if not is_healthy(url)]:
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
        answering = set(self._children)  # a server that starts does not listen yet
        while True:
            await asyncio.sleep(POLL_S)
            answering |= {url for url in set(self._children) - answering if await asyncio.to_thread(is_healthy, url)}
            self._silent |= set(await asyncio.to_thread(self._deaf.among, sorted(answering)))
            while self._silent:
                url = self._silent.pop()
                await asyncio.to_thread(stop_all, [self._children[url]], GRACE_S)
            for url, child in self._children.items():
                if child.exit_code is None:
                    continue
                if self._restarted == self._config.rollout.max_restarts:
                    self._fail_if_dead()
                self._restarted += 1
                answering.discard(url)
                self._children[url] = await asyncio.to_thread(child.again)

    def give_up(self, url: str) -> None:
        """End an engine that gives no sign of life; `watch` starts it again."""
        self._silent.add(url)

    def _fail_if_dead(self) -> None:
        dead = [child for child in self._children.values() if child.exit_code is not None]
        if dead:
            restarted = f"\nengines had been started again {self._restarted} times" if self._restarted else ""
            raise EngineError("\n".join(str(failure_of(c, self._folder)) for c in dead) + restarted)

    def _start(self, index: int) -> None:
        config, kind = self._config, engine_of(self._config)
        host, port = config.rollout.host, free_port(config.rollout.host)
        start = Start(str(self._model), port, self._scratch.path, on_gpus=bool(self._gpus), weights=Weights.FOLDER)
        command = kind.command(config, interpreter(config), start)
        environment = {**kind.environment(config, start.on_gpus), **self._scratch.environment, **self._devices(index)}
        child = Child.start(f"engine {index}", command, self._folder / f"engine_{index}.log", environment)
        self._children[f"http://{host}:{port}"] = child

    def _devices(self, index: int) -> dict[str, str]:
        if not self._gpus:
            return {}
        width = self._config.rollout.tensor_parallel
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus[index * width : (index + 1) * width])}
