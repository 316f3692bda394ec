"""Engines of an evaluation, as processes: started, waited for, started again, ended. Real engines: tests/end_to_end."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_hpt.config import Config, DataConfig, DeadlinesConfig, ModelConfig, RolloutConfig
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.engines.running import is_healthy
from megatron_hpt.engines.types import Weights
from megatron_hpt.errors import DeadlineError, EngineError
from megatron_hpt.launch.evaluate.servers import Servers
from megatron_hpt.process import TOKEN_VARIABLE

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.headers["Authorization"] == "Bearer " + os.environ["HPT_TOKEN"]
        self.send_response(200 if known and self.path == "/health" else 404)
        self.end_headers()
print(os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two engines that are a server of a few lines, with a token of their own."""
    monkeypatch.setenv(TOKEN_VARIABLE, "token")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def command(config, python, start):
        assert start.weights is Weights.FOLDER
        (start.folder / f"private_{start.port}").write_text("as SGLang's token")
        return [python, "-c", SERVER, str(start.port)]

    serving = replace(ENGINES["vllm"], command=command, environment=lambda config, on_gpus: dict(os.environ))
    monkeypatch.setitem(ENGINES, "vllm", serving)
    rollout = RolloutConfig(servers=2, tensor_parallel=2, max_restarts=1)
    return Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train=""), rollout=rollout)


def kill(servers: Servers, url: str) -> None:
    process = servers.fleet[url].process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_engines_that_die_are_started_again_as_often_as_allowed(config: Config, tmp_path: Path) -> None:
    said: list[str] = []
    with Servers(config, tmp_path, tmp_path / "logs", tuple("4567")) as servers:
        servers.wait(said.append)
        first, second = servers.urls
        assert all(text.startswith("starting: engine ") for text in said)

        async def killed() -> None:
            watch = asyncio.create_task(servers.watch())
            kill(servers, first)
            while not await asyncio.to_thread(is_healthy, first):
                await asyncio.sleep(0.05)
            kill(servers, second)
            await asyncio.wait_for(watch, 20)

        with pytest.raises(EngineError, match=r"engine 1 died \(exit code -9, SIGKILL\)[\s\S]*started again 1 times"):
            asyncio.run(killed())
        pids = [child.process.pid for child in servers.fleet.values()]
    assert not any(map(psutil.pid_exists, pids))
    assert [(tmp_path / "logs" / f"engine_{i}.log").read_text().split()[0] for i in range(2)] == ["4,5", "6,7"]


@pytest.mark.slow
def test_an_engine_that_hangs_is_given_up_and_started_again(config: Config, tmp_path: Path) -> None:
    with Servers(config, tmp_path, tmp_path / "logs", ()) as servers:
        servers.wait(lambda text: None)
        first, second = servers.urls
        stopped, untouched = (servers.fleet[url].process for url in (first, second))

        async def given_up() -> None:
            watch = asyncio.create_task(servers.watch())
            os.killpg(stopped.pid, signal.SIGSTOP)
            servers.give_up(first)
            while servers.fleet[first].process is stopped or not await asyncio.to_thread(is_healthy, first):
                await asyncio.sleep(0.05)
            watch.cancel()

        asyncio.run(asyncio.wait_for(given_up(), 30))
        assert stopped.poll() is not None
        assert untouched.poll() is None


def test_an_engine_that_listens_no_more_is_started_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_hpt.launch.engine_fleet.StoppedListening.among",
        lambda self, urls: [first] if urls and not again() else [],
    )
    with Servers(config, tmp_path, tmp_path / "logs", ()) as servers:
        servers.wait(lambda text: None)
        first, before = servers.urls[0], servers.fleet[servers.urls[0]].process

        def again() -> bool:
            return servers.fleet[first].process is not before

        async def restarted() -> None:
            watch = asyncio.create_task(servers.watch())
            while not again() or not await asyncio.to_thread(is_healthy, first):
                await asyncio.sleep(0.05)
            watch.cancel()

        asyncio.run(asyncio.wait_for(restarted(), 30))
        assert before.poll() is not None


def test_an_engine_that_is_never_ready_is_late(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = config.model_copy(update={"deadlines": DeadlinesConfig(startup_s=0.1)})
    monkeypatch.setattr("megatron_hpt.launch.evaluate.servers.is_healthy", lambda url: False)
    with (
        Servers(late, tmp_path, tmp_path / "logs", ()) as servers,
        pytest.raises(DeadlineError, match=r"engine 0, engine 1 not ready within \d+ s \(deadlines\.startup_s\)"),
    ):
        servers.wait(lambda text: None)
