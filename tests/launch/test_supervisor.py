"""The start of a run: who is waited for, for how long, and that a notice ends it. Parts are processes of a few lines."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_hpt.blackboard import Blackboard
from megatron_hpt.config import Config, DataConfig, DeadlinesConfig, ModelConfig, RolloutConfig, TransferConfig
from megatron_hpt.errors import DeadlineError, RequeueRequested
from megatron_hpt.launch.children import Child, stop_all
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.launch.starting import Starting
from megatron_hpt.launch.supervisor import Supervisor
from megatron_hpt.run import RunDir, create

ROOT = Path(__file__).parents[2]
WAITS = "import time; time.sleep(600)"
ANSWERS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
IS_READY = """
import sys, time
from megatron_hpt.blackboard import Blackboard, ready
Blackboard.join(sys.argv[3]).put(ready("coordinator"), True)
time.sleep(600)
"""


@pytest.fixture
def port() -> int:
    return free_port("127.0.0.1")


class Parts:
    """A launcher whose engine answers, whose coordinator is ready, and whose trainer never is."""

    host = "127.0.0.1"

    def __init__(self, run: RunDir, port: int) -> None:
        self._run, self._port = run, port

    def _start(self, name: str, code: str, *arguments: str) -> Child:
        return Child.start(
            name, [sys.executable, "-c", code, *arguments], self._run.log(name.replace(" ", "_")), {**os.environ}
        )

    def trainer(self, arguments: Sequence[str]) -> Child:
        return self._start("trainer", WAITS)

    def coordinator(self, arguments: Sequence[str]) -> Child:
        return self._start("coordinator", IS_READY, *arguments)

    def engine(self, index: int) -> tuple[str, Child]:
        return f"http://127.0.0.1:{self._port}", self._start(f"engine {index}", ANSWERS, str(self._port))

    def stop(self, children: Sequence[Child]) -> None:
        stop_all(children, grace_s=1.0)


FILLS = """
import os, sys
from pathlib import Path
from megatron_hpt.process import ends_in_words, log_to
run = Path(sys.argv[1])
log_to(run / "logs" / "coordinator.log")
with ends_in_words(run):
    with (run / "batches" / "step_000000.arrow").open("wb", buffering=0) as file:
        while True:
            os.write(file.fileno(), bytes(65536))
"""
GIVES_BACK = """if True:
            try:
                while True: os.write(file.fileno(), bytes(65536))
            finally: os.ftruncate(file.fileno(), 0)
        while False"""
FULL_DISK = """
import sys
from pathlib import Path
from megatron_hpt.errors import HptError
from megatron_hpt.launch.launchers import free_port
from tests.launch import test_supervisor as parts
parts.IS_READY = parts.FILLS
try:
    parts.supervisor(Path(sys.argv[1]), free_port("127.0.0.1"), 60.0).run()
except HptError as error:
    print(type(error).__name__, error.EXIT_CODE, error)
"""


def config(startup_s: float, **sections: object) -> Config:
    deadlines = DeadlinesConfig(startup_s=startup_s)
    return Config(name="x", model=ModelConfig(path="m"), data=DataConfig(train="t"), deadlines=deadlines, **sections)


def supervisor(tmp_path: Path, port: int, startup_s: float) -> Supervisor:
    run = create(config(startup_s), tmp_path)
    return Supervisor(config(startup_s), run, 0, Parts(run, port))


@pytest.mark.slow
def test_a_trainer_that_is_never_ready_is_named_in_time(tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeadlineError, match=r"^trainer not ready within 8 s \(deadlines\.startup_s\); see "):
        supervisor(tmp_path, port, 8.0).run()
    said = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert said[0].startswith("starting: engine 0, trainer")
    assert said[-1] == "starting: trainer"


def test_a_notice_ends_a_run_whose_trainer_is_not_ready(tmp_path: Path, port: int) -> None:
    started, board = supervisor(tmp_path, port, 600.0), []

    def notify() -> None:
        while not started._starting.announced:
            time.sleep(0.05)
        board.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=notify, daemon=True).start()
    with pytest.raises(RequeueRequested, match="ended by SIGTERM before training"):
        started.run()
    assert time.monotonic() - board[0] < 10


def test_a_trainer_on_the_engines_gpus_has_its_time_from_when_they_answer(tmp_path: Path) -> None:
    """It waits for them, however long they take."""
    board = Blackboard.host()
    shared = config(0.3, transfer=TransferConfig(transport="cuda_ipc"), rollout=RolloutConfig(urls=["http://x"]))
    starting = Starting(shared, board, tmp_path, 0)
    board.put("ready/coordinator", True)
    starting._begun -= 10
    assert str(starting.look({})).startswith("starting: trainer")
    assert (starting.announced, starting.over) == (True, False)
    board.put("ready/trainer", True)
    assert starting.look({}) == "the trainer sends its weights to the engines"
    assert starting.over
    board.put("published/0", {})
    assert starting.look({}) is None


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["what was written stays", "what was written is gone"])
def test_a_full_disk_is_named_with_its_sizes(tmp_path: Path, kept: bool) -> None:
    """Even when the logs had no room for it, or when there is room again because a half-written file was removed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = FULL_DISK if kept else FULL_DISK.replace("parts.FILLS", f"parts.FILLS.replace('while True', {GIVES_BACK!r})")
    mounted = ["sh", "-c", 'mount -t tmpfs -o size=4m hpt "$1" && exec "$2" -c "$3" "$1"', "-", str(disk), sys.executable, code]
    done = subprocess.run(["unshare", "--mount", *mounted], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if "Operation not permitted" in done.stderr:
        pytest.skip("may not mount a small disk (unshare --mount)")
    said = done.stdout.partition("NoSpaceError 74 ")[2]
    assert said.startswith("no space left on the file system of "), done.stdout + done.stderr
    assert "of 4 MiB are free" in said
    assert "coordinator died (exit code 74)" in said
