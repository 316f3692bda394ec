"""Programs in the jail: real namespaces, real limits."""

import asyncio
import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from megatron_hpt.config import CodeRewardConfig, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.rewards import code, sandbox
from megatron_hpt.rewards.grades import Answer, Ungradable
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rewards.sandbox import SandboxError, SandboxLimits, run

pytestmark = pytest.mark.slow
LIMITS = SandboxLimits(time_s=1.0, memory_mib=256, processes=16, disk_mib=8)


@pytest.fixture(scope="module", autouse=True)
def jailed() -> None:
    try:
        sandbox.require()
    except ConfigError as error:
        pytest.skip(str(error))


def prints(program: str, expected: str, limits: SandboxLimits = LIMITS) -> None:
    """The program prints that, and nothing else."""
    assert run(program, [{"input": "", "output": expected}], limits) == {"passed": True, "detail": ""}


def test_programs_are_judged_by_what_they_print() -> None:
    tests = [{"input": "3 4\n", "output": "7\n"}, {"input": "5 5", "output": "10"}]
    assert run("print(sum(map(int, input().split())))", tests, LIMITS)["passed"]
    assert run("input(); print(7)", tests, LIMITS) == {"passed": False, "detail": "test 1: wrong output"}
    assert run("print(7); 1/0", tests, LIMITS)["detail"] == "test 0: exit code 1"


@pytest.mark.parametrize(
    "ending", ["", "import sys; sys.exit(0)", "import os; os._exit(0)", "print('passed'); raise SystemExit"]
)
def test_a_program_that_ends_before_its_tests_has_not_passed_them(ending: str) -> None:
    tests = [{"code": "assert double(4) == 8"}]
    assert run("def double(x): return 2 * x", tests, LIMITS)["passed"]
    assert not run(f"def double(x): return 3 * x\n{ending}", tests, LIMITS)["passed"]
    if ending:
        assert not run(f"def double(x): return 2 * x\n{ending}", tests, LIMITS)["passed"]


CHEATS = {
    "the sign": "import os, sys\nsys.stdout.write(sys.stdin.readline().strip()); sys.stdout.flush(); os._exit(0)",
    "an echo": "print(input(), end='')\nraise SystemExit",
    "no exec": "import builtins\nbuiltins.exec = lambda *given: None",
    "no test": "import builtins\nmake = builtins.compile\nbuiltins.compile = lambda text, *given: make('pass', *given)",
    "the wrapper's names": "import __main__\nfor name in list(vars(__main__)): setattr(__main__, name, print)",
    "another os.write": "import os\nwrite = os.write\nos.read = lambda *given: b''",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS.keys())
def test_a_program_does_not_pass_by_tampering_with_its_test(program: str) -> None:
    assert not run(program, [{"code": "assert double(4) == 8"}], LIMITS)["passed"]


def test_a_program_that_is_tested_is_a_module_as_when_it_is_run() -> None:
    program = """
from __future__ import annotations
import pickle, sys
from dataclasses import dataclass
@dataclass
class Point:
    x: int
print("noise", end="")
sys.stdout = open("/tmp/elsewhere", "w")
def again(): return pickle.loads(pickle.dumps(Point(3))).x
"""
    assert run(program, [{"code": "assert again() == 3"}, {"code": "import os\nassert __name__ == '__main__'"}], LIMITS)[
        "passed"
    ]


def test_memory_that_no_process_has_is_refused() -> None:
    """What a process makes and lets go of again counts for none of its limits: SysV segments, files in memory."""
    prints("import ctypes; print(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600))", "-1")
    prints("import os\ntry: os.memfd_create('x')\nexcept PermissionError: print('refused')", "refused")
    many = "import os\ntry:\n    for n in range(50_000): os.mknod(f'/tmp/{n}')\nexcept OSError: print(n < 20_000)"
    prints(many, "True", SandboxLimits(10.0, 256, 16, 8))


def test_there_is_no_network() -> None:
    prints("import socket; print([name for _, name in socket.if_nameindex()])", "['lo']")
    reach = "import socket\ntry: socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError: print('unreachable')"
    prints(reach, "unreachable")


def test_nothing_of_the_machine_is_in_sight() -> None:
    prints(
        "import os; print('1' in os.listdir('/proc'), [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 20])",
        "True []",
    )
    prints("import os; print(any(map(os.path.exists, ['/etc/passwd', '/var', '/root/.ssh', '/home', '/sys'])))", "False")
    prints("import os; print(sorted(os.environ.keys() - {'LC_CTYPE'}))", "['HOME', 'PATH']")
    prints("import os; print(os.getuid())", "65534")


def test_what_is_shown_cannot_be_changed() -> None:
    attempts = ["/usr/x", "/harness/harness.py", "/x", "/dev/x", os.__file__]
    program = f"""
for path in {attempts}:
    try:
        open(path, "w")
        print("wrote", path)
    except OSError:
        pass
print("done")
"""
    prints(program, "done")
    prints(
        "import ctypes; c = ctypes.CDLL(None); print(c.unshare(0x10000000), c.mount(b'a', b'/tmp', b'tmpfs', 0, 0))", "-1 -1"
    )


def test_the_judge_is_out_of_reach() -> None:
    program = """
import os
for attempt in (lambda: open("/proc/1/mem", "rb"), lambda: os.listdir("/proc/1/fd"), lambda: open("/proc/1/environ").read()):
    try:
        attempt()
        print("reached")
    except OSError:
        pass
try:
    os.kill(1, 9)
except OSError:
    pass
print("done")
"""
    prints(program, "done")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("while True: pass", "out of time"),
        ("import time; time.sleep(1000)", "out of time"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "out of time"),
        ("import os\nos.fork() or os.setsid() and __import__('time').sleep(1000)\nprint(7)", None),
        ("x = bytearray(10**9)", "exit code 1"),
        ("open('/tmp/a', 'wb').write(bytes(10**8))", "exit code 1"),
        ("for n in range(99): open(f'/tmp/{n}', 'wb').write(bytes(10**6))", "exit code 1"),
        ("while True: print('x' * 1000)", "exit code -9"),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", "out of time"),
    ],
)
def test_whatever_a_program_does_it_ends_and_leaves_nothing(program: str, detail: str | None) -> None:
    before, started = jailed_processes(), time.monotonic()
    verdict = run(program, [{"input": "", "output": "8"}], LIMITS)
    assert not verdict["passed"]
    assert detail is None or detail in verdict["detail"]
    assert time.monotonic() - started < LIMITS.time_s + 4
    while jailed_processes() - before and time.monotonic() - started < LIMITS.time_s + 6:  # others may jail programs here too
        time.sleep(0.1)
    assert not jailed_processes() - before


def jailed_processes() -> set[str]:
    """Those that are in another PID namespace than this one."""
    spaces = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            spaces[pid] = os.readlink(f"/proc/{pid}/ns/pid")
    return {pid for pid, space in spaces.items() if space != spaces[str(os.getpid())]}


def test_a_fork_bomb_stays_within_its_limit() -> None:
    program = """
import os, time
made = 0
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(100)
        made += 1
    except OSError:
        break
print(made < 17)
"""
    prints(program, "True")


def test_killing_the_jail_from_outside_ends_all_of_it(tmp_path: Path) -> None:
    started = subprocess.Popen(
        ["python3", "-c", f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parents[3])!r})\n{HOLD}"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[3]), "TMPDIR": str(tmp_path)},
    )
    wait_until(runs=True)
    started.kill()
    started.wait()
    wait_until(runs=False)


def wait_until(runs: bool) -> None:
    """The program of `HOLD` runs, or not."""
    deadline = time.monotonic() + 30
    while (
        subprocess.run(["pgrep", "-f", "^python3 -c import time; time.sleep.4343"], capture_output=True).returncode == 0
    ) != runs:
        assert time.monotonic() < deadline
        time.sleep(0.05)


HOLD = """
from megatron_hpt.rewards.sandbox import SandboxLimits, run
run("import os; os.execvp('python3', ['python3', '-c', 'import time; time.sleep(4343)'])", [{"input": "", "output": ""}],
    SandboxLimits(60.0, 256, 16, 8))
"""


def test_a_machine_without_namespaces_is_refused_and_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A jail that cannot be built: the kernel's answer is what a container without the right gives."""
    jail = tmp_path / "jail.py"
    jail.write_text((Path(sandbox.__file__).parent / "jail.py").read_text().replace('"user": 0x10000000', '"user": 0x1'))
    monkeypatch.setattr(sandbox, "_HERE", tmp_path)
    with pytest.raises(SandboxError, match="unshare"):
        run("open('/tmp/hpt-was-here', 'w')", [{"input": "", "output": ""}], LIMITS)
    assert not Path("/tmp/hpt-was-here").exists()
    sandbox.require.cache_clear()
    with pytest.raises(ConfigError, match="cannot be jailed here"):
        sandbox.require()
    sandbox.require.cache_clear()


IO = json.dumps({"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]})


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        ("```python\nprint(2 * int(input()))\n```", IO, 1.0),
        ("```python\nprint(4)\n```", IO, 0.0),
        ("<think>```python\nprint(2 * int(input()))\n```</think> no idea", IO, 0.0),
        ("```\nprint(1)\n``` better:\n```py\nprint(2 * int(input()))\n```", IO, 1.0),
        ("```python\ndef f(x): return x + 1\n```", "assert f(1) == 2", 1.0),
        ("```python\ndef f(x): return x\n```", "assert f(1) == 2", 0.0),
        ("```python\nprint(2 * int(input()))\n```", "[]", None),
        ("```python\nprint(2 * int(input()))\n```", '{"inputs": ["1", "2"], "outputs": ["2"]}', None),
    ],
)
def test_the_reward(response: str, truth: str, score: float | None) -> None:
    grade = code.build(RewardConfig(code=CodeRewardConfig(time_s=2.0)))
    if score is None:
        with pytest.raises(Ungradable, match=r"no tests|2 inputs and 1 outputs"):
            grade(Answer(response, truth))
    else:
        assert grade(Answer(response, truth)) == score


def test_a_program_may_not_take_longer_than_its_grade() -> None:
    with pytest.raises(ValueError, match=r"reward\.code\.time_s: given 30; must be below reward\.deadline_s=10"):
        RewardConfig(name="code", code=CodeRewardConfig(time_s=30.0))


def test_programs_are_jailed_in_grader_processes_too() -> None:
    settings = RewardConfig(name="code", deadline_s=30.0, code=CodeRewardConfig(time_s=1.0))
    with GraderPool(settings) as pool:
        bomb = ("```python\nimport os\nwhile True: os.fork()\n```", IO)
        good = ("```python\nprint(2 * int(input()))\n```", IO)
        assert [grade.score for grade in asyncio.run(pool.grade([good, bomb, good]))] == [1.0, 0.0, 1.0]
