"""Ranks of the real actor for tests, without the ten seconds of imports that each would begin with.

One process imports torch and Megatron once and forks the ranks of every test; it computes nothing itself. What a rank
runs is a script as torchrun would start it. Runs from end to end start their trainers by torchrun, as users do.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from megatron_hpt.launch.launchers import free_port
from tests import fake_gpu

ROOT = Path(__file__).parent.parent
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Environment of a rank that a test starts as a process of its own."""


def run_ranks(script: Path, *arguments: object, ranks: int, timeout: float = 300, **environment: str) -> None:
    """Run a script on so many ranks of one process group.

    Raises:
        AssertionError: a rank failed, or they took longer; with what they wrote last.
    """
    server = _server()
    # Ranks end at once, without removing what they have made: their temporary files have a folder of their own.
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", suffix=".log") as log, tempfile.TemporaryDirectory() as own:
        job = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "ranks": ranks,
            "timeout": timeout,
            "environment": {**fake_gpu.with_devices(), "OMP_NUM_THREADS": "1", "TMPDIR": own, **environment},
            "folder": str(Path.cwd()),
            "log": log.name,
        }
        try:
            server.stdin.write(json.dumps(job) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
        except BaseException:  # ranks that outlive an interrupt would make their log again
            server.kill()
            server.wait()
            _server.cache_clear()
            raise
        assert answer, "the process that forks ranks has died"
        failure = json.loads(answer)
        assert failure is None, f"{failure}\n{log.read()[-4000:]}"


@cache
def _server() -> subprocess.Popen:
    # Megatron asks for devices when it is imported; by the driver's library that leaves forks able to use them.
    devices = {**fake_gpu.with_devices(), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    environment = {**devices, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        server.stdin.close()
        server.wait(10)


def _serve() -> None:
    """A job a line; the answer is null, or what went wrong."""
    import torch._dynamo  # noqa: F401  (torch's optimizers import it when they are made)

    import megatron_hpt.actor.trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_run(**json.loads(line))) + "\n")
        answers.flush()


def _run(ranks: int, timeout: float, **job) -> str | None:
    port, running = free_port("127.0.0.1"), {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(rank, ranks, port, **job)
        running[child] = rank
    deadline, failure = time.monotonic() + timeout, None
    while running and failure is None:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            failure = f"ranks {sorted(running.values())} have not ended in {timeout} s" if time.monotonic() > deadline else None
            time.sleep(0.02)
        elif status:
            failure = f"rank {running.pop(child)} ended with exit code {os.waitstatus_to_exitcode(status)}"
        else:
            del running[child]
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return failure


def _rank(
    rank: int, ranks: int, port: int, script: str, arguments: list[str], environment: dict, folder: str, log: str
) -> None:
    """Never returns."""
    import runpy
    import traceback

    from megatron_hpt.process import die_with_parent, log_to

    code = 1
    try:
        die_with_parent()
        log_to(Path(log))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ |= environment | {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        tempfile.tempdir = None
        fake_gpu.prepare_rank()
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # whatever it is, it belongs into the log, and the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
