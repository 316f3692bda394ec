"""Programs that nobody has read, run where they can do no harm.

A program gets user, mount, process, network and IPC namespaces of its own: it sees the interpreter and the system's libraries,
read-only, and a small memory file system that is gone afterwards; it has no network, no privileges, no other process in
sight, and limits on time, memory, processes and files (`jail.py`). When the jail's first process ends, the kernel ends all
others in it. Where the kernel does not allow this, nothing is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_hpt.errors import ConfigError

_HERE = Path(__file__).parent
_START_S = 5.0
"""For the jail itself, beside what its program may take."""


@dataclass(frozen=True)
class SandboxLimits:
    """Of one program."""

    time_s: float
    """For each test."""
    memory_mib: int
    """Address space of one process."""
    processes: int
    disk_mib: int


class SandboxError(Exception):
    """The jail did not come about, or did not answer."""


def run(program: str, tests: list[dict[str, str]], limits: SandboxLimits) -> dict[str, Any]:
    """Run a Python program on tests, until one fails.

    Args:
        tests: each has `input` and `output` of the program, or `code` that is run behind it and must not raise.

    Returns:
        passed: whether all did; detail: what the first that failed did instead.

    Raises:
        SandboxError: nothing was run, or the outcome is not known.
    """
    order = json.dumps({"program": program, "tests": tests, "time_s": limits.time_s})
    with tempfile.TemporaryDirectory(prefix="hpt-jail-") as root:
        command = [sys.executable, "-I", "-S", str(_HERE / "jail.py"), root, json.dumps(_place(limits, len(tests)))]
        jail = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, start_new_session=True
        )
        try:
            verdict, errors = jail.communicate(order.encode(), timeout=limits.time_s * max(1, len(tests)) + _START_S)
        except subprocess.TimeoutExpired:
            raise SandboxError("the jail did not end in time") from None
        finally:  # the grader's own alarm may have come
            jail.kill()
            jail.wait()
    try:
        return json.loads(verdict)
    except ValueError:
        raise SandboxError(errors.decode(errors="replace").strip()[-500:] or f"the jail ended with {jail.returncode}") from None


def _place(limits: SandboxLimits, tests: int) -> dict[str, Any]:
    """What the jail is told: limits, what it shows of this machine, and the interpreter."""
    shown = ["/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/alternatives", sys.base_prefix, sys.prefix]
    cpu_s = int(limits.time_s * max(1, tests)) + 2
    return {
        **asdict(limits),
        "cpu_s": cpu_s,
        "shown": [path for path in dict.fromkeys(shown) if os.path.lexists(path)],
        "python": sys.executable,
        "harness": str(_HERE / "harness.py"),
    }


@cache
def require() -> None:
    """Refuse a machine that cannot jail a program.

    Raises:
        ConfigError: says what stands in the way.
    """
    try:
        verdict = run("print(input())", [{"input": "ready", "output": "ready"}], SandboxLimits(10.0, 512, 8, 1))
        problem = None if verdict["passed"] else verdict["detail"]
    except SandboxError as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"reward code: programs cannot be jailed here ({problem}), and are not run without it. It needs Linux with "
            "unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0, and in "
            "a container a seccomp profile that allows unshare, mount and pivot_root"
        )
