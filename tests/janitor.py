"""What a whole test run must not leave behind: processes, ports, shared memory, network namespaces, temporary files.

The process that pytest was started as becomes the janitor, and pytest goes on in a child. The kernel gives the janitor whatever
loses its parent, so when pytest has ended, however it did, all that it started and that still runs is a descendant.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from megatron_hpt.launch.children import shared_memory
from megatron_hpt.launch.scratch import keep_compiled, sweep
from tests.slurm.cluster import remove_networks_of_the_dead

MARK = "HPT_TESTS"
"""Environment variable with the folder for all temporary files of a test run; set: somebody watches already."""
SECONDS = float(os.environ.get("HPT_TESTS_SECONDS", "15"))
"""For what is still ending."""
SHARED = os.environ.get("HPT_TESTS_SHARED", "")
"""How shared memory is called that is looked at: tests of the janitor itself look past that of the tests beside them."""
INTERRUPTED, FAILED = 2, 1
"""Exit codes of pytest."""
_SUBREAPER, _DEATH_SIGNAL = 36, 1
_PYTEST = "pytest-of-"
"""Begins the name of the folder where pytest keeps `tmp_path`."""
_COMPILED = Path(__file__).parents[1] / "build" / "torchinductor"


def watch(out: int) -> None:
    """Returns in a child; this process itself waits for the child, says what is left, and ends with its exit code or with 1.

    Args:
        out: file descriptor for what it says.
    """
    folder = Path(tempfile.mkdtemp(prefix="hpt-tests-"))
    folder.chmod(0o711)  # munge wants to be reached by everybody
    os.environ[MARK] = os.environ["TMPDIR"] = str(folder)
    keep_compiled(folder, _COMPILED)
    own = set(os.listdir(folder))
    tempfile.tempdir = None
    before = {name: set(found()) for name, found in KINDS.items()}
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what it starts in the background
        return
    code = 3
    try:
        code = _wait(child)
        if code == INTERRUPTED:  # processes of tests are killed in their middle: pytest-xdist gives them seconds
            sweep()
            if shutil.which("ip"):
                remove_networks_of_the_dead()
            own = set(os.listdir(folder))  # removed whole, below
        left = _left(folder, own, before)
        for line in left or ["nothing is left: no process, port, shared memory, network or temporary file"]:
            os.write(out, f"{line}\n".encode())
        if code != FAILED:  # else what failed tests have made is to be looked at
            shutil.rmtree(folder, ignore_errors=True)
        code = code or (FAILED if left else 0)
    except BaseException:  # this process has pytest's stack below it, and must not go on there
        os.write(out, traceback.format_exc().encode())
    os._exit(code)


def _wait(child: int) -> int:
    """Its exit code; meanwhile everybody who ends is buried. A signal is the child's own affair, the terminal tells both."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os.kill(child, signal.SIGINT))
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return abs(os.waitstatus_to_exitcode(status))


def _left(folder: Path, own: set[str], before: dict[str, set[str]]) -> list[str]:
    """A line for everything that is left; processes are ended."""
    deadline = time.monotonic() + SECONDS
    while (alive := _descendants()) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = [f"left: process {p.pid}: {_command(p)}{_ports(p)}" for p in alive]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    noted = _first_seen(folder).read_text().splitlines() if _first_seen(folder).is_file() else []
    seen = dict(line.split("\t") for line in reversed(noted))
    while _appeared(before) and time.monotonic() < deadline:
        time.sleep(0.2)
    for kind, found in KINDS.items():
        lines += [f"left: {kind} {name}{_during(seen, name)}" for name in sorted(set(found()) - before[kind])]
    own = {*own, _first_seen(folder).name}
    strangers = [name for name in os.listdir(folder) if name not in own and not name.startswith(_PYTEST)]
    return lines + [f"left: temporary {name}{_during(seen, name)}" for name in sorted(strangers)]


def _appeared(before: dict[str, set[str]]) -> bool:
    """Whether there is anything that was not there before; what others remove in a moment is not left."""
    return any(set(found()) - before[kind] for kind, found in KINDS.items())


def _descendants() -> list[psutil.Process]:
    """Those who live; the dead are buried."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())[:200]
    return "?"


def _ports(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        ports = [str(c.laddr.port) for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return f", port {', '.join(ports)}" if ports else ""
    return ""


def _shared_memory() -> Iterator[str]:
    """Names that no process has mapped: other programs of this machine have theirs."""
    mapped = set().union(*map(shared_memory, psutil.pids()))
    yield from (path.name for path in Path("/dev/shm").iterdir() if path not in mapped and path.name.startswith(SHARED))


def _networks() -> Iterator[str]:
    spaces = Path("/run/netns")
    yield from os.listdir(spaces) if spaces.is_dir() else ()


KINDS: dict[str, Callable[[], Iterator[str]]] = {"shared memory": _shared_memory, "network namespace": _networks}


# What tests tell while they run.


def note(test: str) -> None:
    """Write down what has appeared since the last test, so that what is left can be traced to one."""
    folder = Path(os.environ[MARK])
    appeared = {name for name in (*os.listdir(folder), *os.listdir("/dev/shm")) if name not in _noted}
    _noted.update(appeared)
    with _first_seen(folder).open("a") as file:
        file.writelines(f"{name}\t{test}\n" for name in appeared)


_noted: set[str] = set()


def _first_seen(folder: Path) -> Path:
    return folder / "first_seen"


def _during(seen: dict[str, str], name: str) -> str:
    return f", first seen after {seen[name]}" if name in seen else ""


def is_watched() -> bool:
    """Whether a janitor waits for this process or one of those that started it; none can where there is no such kernel."""
    return MARK in os.environ or sys.platform != "linux"
