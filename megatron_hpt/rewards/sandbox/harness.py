"""Process 1 of a jail: runs a program on tests and prints a verdict as JSON (imports nothing of the project).

It is out of the program's reach: signals from within a jail do not end its first process, it cannot be traced, and tests and
verdict go through pipes that the program does not have.
"""

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time

_PR_SET_DUMPABLE = 4
_MOST_OUTPUT = 1 << 20
_BEHIND = """
import os, sys, types

def main(run=exec, make=compile, read=os.read, write=os.write, end=os._exit):
    order = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    with open("/tmp/program.py") as file:
        source = file.read()
    run(make(source, "program.py", "exec"), module.__dict__)
    given = b""
    while part := read(order, 1 << 16):
        given += part
    sign, _, test = given.partition(b"\\n")
    run(make(test, "test.py", "exec"), module.__dict__)
    sys.stdout.flush()
    write(1, sign)
    end(0)

main()
"""
"""A program with a test behind it. Neither the test nor the sign that it came to its end is where a program reads or changes
things by its ordinary means: standard input is empty for it, and the built-in functions are those from before it."""


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    order = json.load(sys.stdin)
    with open("/tmp/program.py", "w", encoding="utf-8") as file:
        file.write(order["program"])
    for number, test in enumerate(order["tests"]):
        problem = _problem(test, order["time_s"])
        if problem:
            return json.dump({"passed": False, "detail": f"test {number}: {problem}"}, sys.stdout)
    json.dump({"passed": True, "detail": ""}, sys.stdout)


def _problem(test: dict[str, str], time_s: float) -> str | None:
    """What the program did wrong."""
    if "code" in test:
        sign = secrets.token_hex(16)
        code, output = _run(["-c", _BEHIND], f"{sign}\n{test['code']}", time_s)
        passed = output.endswith(sign)
    else:
        code, output = _run(["/tmp/program.py"], test["input"], time_s)
        passed = code == 0 and output.split() == test["output"].split()
    if passed:
        return None
    return "out of time" if code is None else f"exit code {code}" if code else "wrong output"


def _run(arguments: list[str], given: str, time_s: float) -> tuple[int | None, str]:
    """Exit code (None: it did not end by itself in time) and output; nothing that it started is left."""
    process = subprocess.Popen(
        [sys.executable, "-I", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/tmp",
    )
    deadline = time.monotonic() + time_s
    output = _converse(process, given.encode(errors="replace"), deadline)
    too_much = len(output) >= _MOST_OUTPUT
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.0 if too_much else max(0.0, deadline - time.monotonic()))
    ended = process.poll() is not None
    _end_all()
    code = process.wait()
    return code if ended or too_much else None, output.decode(errors="replace")


def _converse(process: subprocess.Popen, given: bytes, deadline: float) -> bytes:
    """Give it its input and take its output, until it closes that, says too much, or is late.

    No threads: a program that multiplies leaves no room for them.
    """
    output = bytearray()
    with selectors.DefaultSelector() as ready:
        for pipe, event in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, event)
        while len(output) < _MOST_OUTPUT and (left := deadline - time.monotonic()) > 0:
            for key, _ in ready.select(left):
                if key.fileobj is process.stdin:
                    given = given[_written(process.stdin.fileno(), given) :]
                    if not given:
                        ready.unregister(process.stdin)
                        process.stdin.close()
                elif part := os.read(process.stdout.fileno(), 1 << 16):
                    output += part
                else:
                    return bytes(output)
    return bytes(output)


def _written(pipe: int, given: bytes) -> int:
    """How much of it went; all, if nobody reads."""
    try:
        return os.write(pipe, given)
    except OSError:
        return len(given)


def _end_all() -> None:
    """Every process of the jail but this one, however fast they multiply: none can start another while all are killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


if __name__ == "__main__":
    main()
