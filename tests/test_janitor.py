"""A whole test run is looked at when it has ended: what it leaves behind is named and fails it, also after Ctrl-C."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.janitor import MARK

ROOT = Path(__file__).parents[1]
LEAVES = """
import os, subprocess, sys, tempfile
from pathlib import Path

def test_process():
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); time.sleep(600)"
    starter = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {listen!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", starter], check=True)

def test_shared_memory():
    Path("/dev/shm/megatron_hpt_left").write_text("x")

def test_folder():
    tempfile.mkdtemp(prefix="forgotten-")
"""
INTERRUPTED = """
import subprocess, sys, time
from pathlib import Path
from tests.ranks import run_ranks

def test_of_ranks_and_a_server_and_a_file(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(f"import time; open({str(tmp_path)!r} + '/runs', 'w').close(); time.sleep(600)")
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        run_ranks(script, ranks=2)
    finally:
        server.kill()
        server.wait()
"""
TIDY = """
import pytest

def test_nothing():
    pass

@pytest.mark.skip("because of the weather")
def test_skipped():
    pass
"""


@pytest.fixture
def nested(tmp_path: Path):
    """Starts pytest with a file of tests, as a developer would."""

    def start(tests: str, *arguments: str, **environment: str) -> subprocess.Popen:
        (tmp_path / "test_inner.py").write_text(tests)
        dropped = (MARK, "PYTEST_XDIST_WORKER", "CI", "PYTEST_ADDOPTS")
        clean = {key: value for key, value in os.environ.items() if key not in dropped}
        command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pytest.ini"), f"--rootdir={tmp_path}", str(tmp_path)]
        own = {
            **clean,
            "TMPDIR": str(tmp_path / "tmp"),
            "HPT_TESTS_SECONDS": "2",
            "HPT_TESTS_SHARED": "megatron_hpt",
            **environment,
        }
        (tmp_path / "tmp").mkdir(exist_ok=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command += ["-p", "no:cacheprovider", *arguments]
        started.append(subprocess.Popen(command, cwd=ROOT, env=own, start_new_session=True, **pipes))
        return started[-1]

    started: list[subprocess.Popen] = []
    yield start
    for run in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


@pytest.mark.slow
def test_what_is_left_is_named_and_fails_the_run(nested) -> None:
    run = nested(LEAVES)
    out, _ = run.communicate(timeout=120)
    Path("/dev/shm/megatron_hpt_left").unlink(missing_ok=True)
    assert run.returncode == 1, out
    assert "3 passed" in out
    assert "left: process" in out
    assert "import socket, time" in out
    assert ", port " in out
    assert "left: shared memory megatron_hpt_left, first seen after test_inner.py::test_shared_memory" in out
    assert "left: temporary forgotten-" in out
    assert not [line for line in os.listdir("/proc") if line.isdigit() and _is_left(line)]


def _is_left(pid: str) -> bool:
    try:
        return b"s = socket.create_server(('127.0.0.1', 0)); time.sleep(600)" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(nested, tmp_path: Path) -> None:
    """In a test with forked ranks, a server of its own and files."""
    run = nested(INTERRUPTED, f"--basetemp={tmp_path}/base")
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("base/**/runs")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    out, _ = run.communicate(timeout=180)
    assert run.returncode == 2, out
    assert "nothing is left" in out


@pytest.mark.slow
def test_seconds_are_told_by_folder_and_unexpected_skips_fail_where_all_should_run(nested) -> None:
    for environment, code in (({}, 0), ({"CI": "1"}, 1)):
        run = nested(TIDY, **environment)
        out, _ = run.communicate(timeout=120)
        assert run.returncode == code, out
        assert "seconds by folder" in out
        assert "test_inner.py::test_skipped: because of the weather" in out
        assert "nothing is left" in out
