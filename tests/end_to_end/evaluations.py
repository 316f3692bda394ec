"""Starting real evaluations from tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_hpt.engines.vllm.server import ONE_PROCESS
from megatron_hpt.evaluation.samples import SampleRow, read_samples
from megatron_hpt.launch.launchers import free_port
from tests.engine_servers import Server, engine_config


class Evaluation:
    """One `megatron-hpt evaluate` of the quickstart's held-out sums, asked as a run of `test_training` asks them."""

    def __init__(self, folder: Path, model: str, out: Path, *more: str) -> None:
        protocol = ("--temperature", "1", "--top-p", "1", "--max-tokens", "24", "--out", str(out))
        command = [sys.executable, "-m", "megatron_hpt.cli", "evaluate", model, *protocol, *more]
        self.file = out / "samples" / "heldout.parquet"
        self._journal = out / "samples" / "heldout.partial.jsonl"
        self._process = subprocess.Popen(
            [*command, "--benchmarks", "build/quickstart/heldout.parquet@2"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, seconds: float = 240) -> str:
        """What it printed."""
        try:
            text, _ = self._process.communicate(timeout=seconds)
        finally:
            self._process.kill()
        assert self._process.returncode == 0, text
        return text

    def kill_after(self, samples: int, seconds: float = 240) -> int:
        """Kill it when it has so many samples; returns how many it had."""
        deadline = time.monotonic() + seconds
        while not self._journal.is_file() or self._journal.read_bytes().count(b"\n") < samples:
            assert self._process.poll() is None, self.finish()
            assert time.monotonic() < deadline, "no samples came"
            time.sleep(0.01)
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        return self._journal.read_bytes().count(b"\n")

    @property
    def rows(self) -> list[SampleRow]:
        return read_samples(self.file)


def stock_server(model: Path, folder: Path) -> Server:
    """vLLM with a tokenizer and OpenAI's routes, without any of ours. (A seeded prompt cut in two kills it on a host.)"""
    port = free_port("127.0.0.1")
    host = ("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *host]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
    command += ONE_PROCESS
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return Server.of_command(command, environment, engine_config("vllm", model), port, folder / "server.log")
