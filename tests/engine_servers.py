"""Real engine servers for tests, started as a run starts them.

A start is the dearest thing there is, so one server of each engine serves all tests that do not need one of their own: runs
reach it by ``rollout.urls``, and bring their weights with them. It has the quickstart's model.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from megatron_hpt import recipe
from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import ENGINES, interpreter
from megatron_hpt.engines.types import Weights
from megatron_hpt.examples import arithmetic, tiny_llama
from megatron_hpt.launch.children import Child, members, shared_memory, stop_all
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.launch.scratch import Scratch
from megatron_hpt.process import TOKEN_VARIABLE, token_header
from megatron_hpt.transfer.control import EngineControl, InFlight

PROMPTS = [[5 + i, 15, 6 + i, 20] for i in range(6)]
TOKENS = 12
QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.py"
TOKEN = "a secret of these tests"
"""What shared servers, and everybody who asks them, have in the environment."""


def engine_config(kind: str, model: Path, tensor: int = 1, dtype: str = "float32", **rollout) -> Config:
    """A run's configuration as far as its engines see it."""
    return Config(
        name="test",
        model=ModelConfig(path=str(model), dtype=dtype),
        data=DataConfig(train="", max_prompt_length=32, max_response_length=32),
        rollout=RolloutConfig(engine=kind, tensor_parallel=tensor, max_running=16, threads=1, **rollout),
    )


def skip_without(kind: str) -> None:
    """CI builds both environments; a developer may have one."""
    try:
        interpreter(engine_config(kind, Path()))
    except Exception as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@dataclass
class Server:
    """One running engine."""

    kind: str
    config: Config
    url: str
    process: subprocess.Popen
    log: Path
    environment: dict[str, str]
    scratch: Scratch
    """Its temporary files."""

    @classmethod
    def start(
        cls, kind: str, model: Path, folder: Path, tensor: int = 1, weights: Weights = Weights.FOLDER, **change
    ) -> "Server":
        """Start it with a model."""
        return cls.of_run(engine_config(kind, model, tensor, **change), folder, weights)

    @classmethod
    def of_run(cls, config: Config, folder: Path, weights: Weights = Weights.NONE) -> "Server":
        """Start it as the supervisor of a run does."""
        kind, port = config.rollout.engine, free_port("127.0.0.1")
        skip_without(kind)
        start = Start(config.engine_model, port, folder, on_gpus=False, weights=weights)
        command = ENGINES[kind].command(config, interpreter(config), start)
        environment = ENGINES[kind].environment(config, False)
        return cls.of_command(command, environment, config, port, folder / f"{kind}_{port}.log")

    @classmethod
    def of_command(cls, command: Sequence[str], environment: dict[str, str], config: Config, port: int, log: Path) -> "Server":
        """Start it by a command line of the test's own."""
        scratch = Scratch()
        environment = {**environment, **scratch.environment}
        process = _logged(command, environment, log)
        return cls(config.rollout.engine, config, f"http://127.0.0.1:{port}", process, log, environment, scratch)

    def again(self) -> "Server":
        """Start it once more at the same address, as a supervisor does."""
        return replace(self, process=_logged(self.process.args, self.environment, self.log))

    def ready(self, seconds: float = 240) -> "Server":
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.3)

    def control(self, deadline_s: float = 60, in_flight: InFlight = InFlight.RECOMPUTE) -> EngineControl:
        return ENGINES[self.kind].control(self.url, deadline_s, in_flight)

    def greedy(self) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and log-probabilities of a few prompts."""
        return greedy(self.kind, self.url)

    def stop(self) -> None:
        """End it with everything it started, as a supervisor does."""
        stop_all([Child(self.kind, self.process, self.log, 0, self.process.args, self.environment)])
        self.scratch.close()

    def kill(self) -> None:
        """End it as a machine's memory does; what nobody is left to remove is removed here."""
        shared = set().union(*(shared_memory(pid) for pid in members(self.process.pid)))
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for path in shared:
            path.unlink(missing_ok=True)


class SharedEngines:
    """One running server of each engine for a whole test run, started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._servers = folder, {}
        self.inputs = folder / "quickstart"
        """What the quickstart makes for itself: its model and its data."""

    def server(self, kind: str) -> Server:
        """The server, answering; it has the weights of whoever sent the last ones."""
        if kind not in self._servers:
            os.environ[TOKEN_VARIABLE] = TOKEN
            if not self.inputs.is_dir():
                arithmetic.write(self.inputs, held_out=64)
                tiny_llama.write(self.inputs / "model")
            longer = "data.max_response_length=56"  # than the quickstart's, for tests that want requests to last
            settings = [f"rollout.engine={kind}", f"model.path={self.inputs}/model", "rollout.threads=1", longer]
            config = recipe.load(str(QUICKSTART), settings).config
            self._servers[kind] = Server.of_run(config, self._folder)
            self._servers[kind].ready()
        return self._servers[kind]

    def replace(self, server: Server) -> None:
        """One that was started in the place of one that a test has killed."""
        self._servers[server.kind] = server

    def close(self) -> None:
        """End them."""
        for server in self._servers.values():
            server.stop()
        self._servers.clear()


def _logged(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


def greedy(
    kind: str, url: str, prompts: Sequence[list[int]] = PROMPTS, tokens: int = TOKENS
) -> list[tuple[list[int], list[float]]]:
    """One prompt after the other, so that batches are equal; every engine's log-probabilities as it reports them."""
    http = httpx.Client(base_url=url, timeout=60, trust_env=False, headers=token_header())
    return [_one(kind, http, prompt, tokens) for prompt in prompts]


def _one(kind: str, http: httpx.Client, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    if kind == "vllm":
        sampling = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0, "detokenize": False}
        body = {"token_ids": prompt, "sampling_params": sampling}
        (choice,) = http.post("/inference/v1/generate", json=body).raise_for_status().json()["choices"]
        return choice["token_ids"], [entry["logprob"] for entry in choice["logprobs"]["content"]]
    sampling = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    answer = http.post("/generate", json=body).raise_for_status().json()
    return answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
