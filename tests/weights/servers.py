"""Real engine servers for tests: started as a run starts them, but with the weights of a folder."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_hpt.process import token_header
from megatron_hpt.rollout.engine import Weights
from megatron_hpt.rollout.engines import ENGINES, Start, interpreter
from megatron_hpt.weights.control import CONTROLS, EngineControl, InFlight
from tests.ranks import free_port

PROMPTS = [[5 + i, 15, 6 + i, 20] for i in range(6)]
TOKENS = 12


def engine_config(kind: str, model: Path, tensor: int = 1, dtype: str = "float32", **rollout) -> Config:
    """A run's configuration as far as its engines see it."""
    return Config(
        name="test",
        model=ModelConfig(path=str(model), dtype=dtype),
        data=DataConfig(train="", max_prompt_length=32, max_response_length=32),
        rollout=RolloutConfig(engine=kind, tensor_parallel=tensor, max_running=16, **rollout),
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

    @classmethod
    def start(
        cls, kind: str, model: Path, folder: Path, tensor: int = 1, weights: Weights = Weights.FOLDER, **change
    ) -> "Server":
        """Start it."""
        skip_without(kind)
        config, port = engine_config(kind, model, tensor, **change), free_port()
        start = Start(config.engine_model, port, folder, on_gpus=False, weights=weights)
        command = ENGINES[kind].command(config, interpreter(config), start)
        log = folder / f"{kind}_{port}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=ENGINES[kind].environment(config, False), stdout=out, stderr=out, start_new_session=True
            )
        return cls(kind, config, f"http://127.0.0.1:{port}", process, log)

    def again(self) -> "Server":
        """Start it once more at the same address, as a supervisor does."""
        with self.log.open("ab") as out:
            environment = ENGINES[self.kind].environment(self.config, False)
            process = subprocess.Popen(self.process.args, env=environment, stdout=out, stderr=out, start_new_session=True)
        return Server(self.kind, self.config, self.url, process, self.log)

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
        return CONTROLS[self.kind](self.url, deadline_s, in_flight)

    def greedy(self) -> list[tuple[list[int], list[float]]]:
        """Greedy tokens and log-probabilities of a few prompts."""
        return greedy(self.kind, self.url)

    def stop(self) -> None:
        """End it with everything it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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
