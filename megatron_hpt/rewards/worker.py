"""Grader processes: ``python -m megatron_hpt.rewards.worker CONTROL_FD``.

A nursery makes the rewards once, imports and all, and forks a grader whenever the pool asks for one: a grader that had to be
killed is replaced within milliseconds. The nursery gets the connection of each grader over its own; both end with the pool.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from megatron_hpt.config import RewardConfig
from megatron_hpt.errors import HptError
from megatron_hpt.process import die_with_parent
from megatron_hpt.rewards.grades import Answer, Cause, Grade, Ungradable, graded, ungraded
from megatron_hpt.rewards.registry import build

Rewards = Mapping[str, Callable[[Answer], float]]

_LENGTH = struct.Struct("!Q")


_ORDINARY = (
    ("\\frac{x+1}{2}", "\\frac{1+x}{2}"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("(1, \\frac{\\pi}{2})", "(1,2)"),
    ("x^2-3x+2", "(x-1)(x-2)"),
    ("[0,1) \\cup (2,\\infty)", "\\{1,-2\\}"),
    ("1.5\\times 10^{3}", "1500"),
    ("y=2x+1", "2x+1"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "x \\le 3"),
)
"""The parser's tables are made as they are needed; these fill them."""


class OutOfTime(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


def send(connection: socket.socket, message: Any) -> None:
    """One JSON message, behind its length."""
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Any:
    """The next message.

    Raises:
        EOFError: the other side is gone.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            raise EOFError
        received += part
    return bytes(received)


def main() -> None:
    """The nursery."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the coordinator ends its graders
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    settings = RewardConfig.model_validate(receive(control))
    try:
        rewards = {name: build(name, settings) for name in settings.names if name != "http"}
        _warm_up(rewards)
    except HptError as error:
        send(control, {"refused": str(error)})
        return
    send(control, {"ready": True})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries its children
    while True:
        _, connections, *_ = socket.recv_fds(control, 1, 1)
        if not connections:  # the pool is gone
            return
        if os.fork() == 0:
            control.close()
            _serve(socket.socket(fileno=connections[0]), rewards, settings)
        os.close(connections[0])


def _warm_up(rewards: Rewards) -> None:
    """Grade once, so that what is loaded or compiled at first use is there in every grader."""
    if "math_reference" in rewards:
        from megatron_hpt.rewards.reference.symbolic import equal

        for answer, truth in _ORDINARY:
            equal(answer, truth)


def _serve(connection: socket.socket, rewards: Rewards, settings: RewardConfig) -> NoReturn:
    """A grader: bunches of jobs come, grades go one by one. It never returns."""
    try:
        os.setsid()  # with all that a reward may start
        die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, _out_of_time)
        memory = int(settings.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        send(connection, os.getpid())
        while True:
            for name, answer in receive(connection):
                grade = grade_in_time(rewards[name], Answer(*answer), settings.deadline_s)
                send(connection, [grade.score, grade.cause, grade.detail])
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)


def _out_of_time(*_: object) -> None:
    raise OutOfTime


def grade_in_time(reward: Callable[[Answer], float], answer: Answer, deadline_s: float) -> Grade:
    """The grade, or why there is none: it takes too long or too much, or raises. Main thread only."""
    try:
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            return graded(reward(answer))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except OutOfTime:
        return ungraded(Cause.DEADLINE, f"not done in {deadline_s:g} s")
    except MemoryError:
        return ungraded(Cause.MEMORY, "out of memory")
    except Ungradable as error:
        return ungraded(Cause.ERROR, str(error))
    except Exception as error:  # whatever a reward raises: the answer is ungraded, with the reason
        return ungraded(Cause.ERROR, f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
