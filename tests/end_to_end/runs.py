"""Starting real runs from tests, and looking at their processes."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.py"
SMALL = (
    *("trainer.prompts_per_step=8", "rollout.samples_per_prompt=4", "optimizer.warmup_steps=0"),
    "rollout.threads=1",  # other tests want the other core: threads that wait for each other would lose their turns
)


@dataclass
class Run:
    """One `megatron-hpt train` in a folder of its own."""

    folder: Path
    process: subprocess.Popen

    @classmethod
    def start(cls, folder: Path, *arguments: str) -> "Run":
        folder.mkdir(exist_ok=True, parents=True)
        command = [sys.executable, "-m", "megatron_hpt.cli", "train", *arguments]
        run = cls(folder, subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        STARTED.append(run)
        return run

    @property
    def path(self) -> Path:
        """The newest run directory."""
        return max((self.folder / "runs").iterdir())

    def finish(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code and everything it printed."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        finally:
            self.end()
        return self.process.returncode, out + err

    def end(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.finish()
            assert time.monotonic() < deadline, "the run did not come that far"
            time.sleep(0.1)

    def lines(self) -> int:
        """Finished steps."""
        runs = list((self.folder / "runs").glob("*/metrics.jsonl"))
        return len(runs[0].read_text().splitlines()) if runs else 0

    def processes(self) -> list[psutil.Process]:
        """Everything below the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def find(self, name: str) -> psutil.Process:
        """One process of the run by the name that the supervisor gives it."""
        return next(p for p in self.processes() if _is(p, name))


STARTED: list[Run] = []
"""Runs that a test has started."""


def _is(process: psutil.Process, name: str) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a helper that ended since the list was made, reaped or not
        return False
    if name.startswith("trainer rank"):
        return "actor.trainer" in command and process.environ().get("RANK") == name[-1]
    if name == "engine core":
        return "EngineCor" in command
    wanted = {"engine 0": "vllm.entrypoints", "coordinator": "rollout.coordinator", "trainer": "torch.distributed.run"}
    return wanted[name] in command


def gone(processes: list[psutil.Process], seconds: float = 15) -> list[psutil.Process]:
    """Those of the processes that are still alive after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
