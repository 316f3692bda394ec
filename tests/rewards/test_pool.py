"""Grader processes, and graders that misbehave."""

import asyncio
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_hpt.config import HttpRewardConfig, RewardConfig
from megatron_hpt.errors import ConfigError
from megatron_hpt.process import TOKEN_VARIABLE
from megatron_hpt.rewards.grades import Answer, Cause, Grade
from megatron_hpt.rewards.http import RewardServer
from megatron_hpt.rewards.pool import GraderPool
from megatron_hpt.rewards.registry import check

MISBEHAVES = """
import ctypes, os, subprocess, time

def stubborn():
    while True:
        try:
            time.sleep(10)
        except BaseException:
            pass

ACTIONS = {
    "sleep": lambda: time.sleep(3600),
    "stubborn": stubborn,
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0),
    "memory": lambda: bytearray(10**11),
    "raise": lambda: {}["cannot"],
    "child": lambda: subprocess.run(["sleep", "4242"]),
    "nan": lambda: float("nan"),
}

def grade(response, ground_truth):
    return ACTIONS[response]() if response in ACTIONS else float(os.getpid() if response == "pid" else response == ground_truth)
"""
CAUSES = {
    "sleep": Cause.DEADLINE,
    "stubborn": Cause.DEADLINE,
    "child": Cause.DEADLINE,
    "exit": Cause.CRASH,
    "segfault": Cause.CRASH,
    "memory": Cause.MEMORY,
    "raise": Cause.ERROR,
    "nan": Cause.ERROR,
}


@pytest.fixture
def settings(tmp_path: Path) -> RewardConfig:
    (tmp_path / "misbehaves.py").write_text(MISBEHAVES)
    return RewardConfig(name=f"{tmp_path}/misbehaves.py:grade", deadline_s=0.5)


@pytest.mark.slow
def test_whoever_misbehaves_is_ungraded_with_a_reason_and_nobody_else(settings: RewardConfig) -> None:
    answers = [(kind, "7") for culprit in CAUSES for kind in ("7", culprit, "8")]
    with GraderPool(settings) as pool:
        grades = asyncio.run(pool.grade(answers))
        assert [grade.score for grade in grades] == [1.0, None, 0.0] * len(CAUSES)
        assert [grade.cause for grade in grades[1::3]] == list(CAUSES.values())
        assert all(grade.detail for grade in grades[1::3])
        assert pool.ungraded == {"deadline": 3, "crash": 2, "memory": 1, "error": 2}
        assert asyncio.run(pool.grade([("7", "7")]))[0].score == 1.0  # the pool lives on
        assert asyncio.run(pool.grade([])) == []
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-f", "^sleep 4242"], stdout=subprocess.DEVNULL).returncode == 0:  # killed with its grader
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lost_grader_is_replaced_at_once_and_the_bunch_goes_on(settings: RewardConfig) -> None:
    with GraderPool(settings) as pool:
        started = time.monotonic()
        grades = asyncio.run(pool.grade([("exit", ""), ("7", "7")] * 20))
        assert [grade.score for grade in grades] == [None, 1.0] * 20
        assert time.monotonic() - started < 5.0  # an import of sympy for each would be 10 s


def test_it_works_from_many_threads_each_with_its_own_loop(settings: RewardConfig) -> None:
    def batch(truth: int) -> list[float | None]:
        assert threading.current_thread() is not threading.main_thread()
        return [grade.score for grade in asyncio.run(pool.grade([(str(n), str(truth)) for n in range(50)]))]

    with GraderPool(settings.model_copy(update={"workers": 2})) as pool, ThreadPoolExecutor(8) as threads:
        for truth, scores in enumerate(threads.map(batch, range(8))):
            assert scores == [float(n == truth) for n in range(50)]


def test_the_pool_can_be_made_in_a_thread_that_ends(settings: RewardConfig) -> None:
    """The kernel's signal for a parent's death would come from the thread."""
    made: list[GraderPool] = []
    maker = threading.Thread(target=lambda: made.append(GraderPool(settings)))
    maker.start()
    maker.join()
    with made[0] as pool:
        assert asyncio.run(pool.grade([("7", "7")]))[0].score == 1.0


def test_a_nursery_that_was_killed_is_replaced(settings: RewardConfig) -> None:
    with GraderPool(settings) as pool:
        (first,) = asyncio.run(pool.grade([("pid", "")]))
        parent = int(Path(f"/proc/{int(first.score)}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
        os.kill(parent, 9)
        while (
            Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
        ):  # else it may fork once more
            time.sleep(0.01)
        grades = asyncio.run(pool.grade([("7", "7")] * 3))
        assert [grade.score for grade in grades] == [1.0, 1.0, 1.0]  # the grader died with it: another one grades them


def test_no_process_outlives_the_pool(settings: RewardConfig) -> None:
    with GraderPool(settings) as pool:
        (grade,) = asyncio.run(pool.grade([("pid", "")]))
        waiting = threading.Thread(target=lambda: asyncio.run(pool.grade([("stubborn", "")] * 3)), daemon=True)
        waiting.start()
        time.sleep(0.2)
    waiting.join(30.0)
    assert not waiting.is_alive()
    for _ in range(600):
        if not Path(f"/proc/{int(grade.score)}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the grader is still there")


def test_responses_of_any_size_and_text_pass(settings: RewardConfig) -> None:
    odd = ["\ud800", "\x00", "é" * 1_000_000, "\u2028\\boxed{", ""]
    with GraderPool(settings) as pool:
        assert [grade.score for grade in asyncio.run(pool.grade([(text, text) for text in odd]))] == [1.0] * len(odd)


@pytest.mark.parametrize(("variable", "sent"), [("", None), ("MY_KEY", "Bearer mine")])
def test_a_reward_server_gets_its_own_key_and_not_the_runs_token(
    monkeypatch: pytest.MonkeyPatch, variable: str, sent: str | None
) -> None:
    """Whoever has the token may change the engines' weights."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    monkeypatch.setenv("MY_KEY", "mine")
    got: list[str | None] = []

    async def classify(request: web.Request) -> web.Response:
        got.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"index": 0, "probs": [0.5]}]})

    async def ask() -> list[Grade]:
        app = web.Application()
        app.router.add_post("/classify", classify)
        async with TestServer(app) as server:
            http = HttpRewardConfig(url=str(server.make_url("")), key_variable=variable)
            return await RewardServer(RewardConfig(name="http", http=http)).grade([Answer("a", "b")])

    assert [grade.score for grade in asyncio.run(ask())] == [0.5]
    assert got == [sent]


def test_a_key_that_is_not_there_is_said() -> None:
    http = HttpRewardConfig(url="http://127.0.0.1:1", key_variable="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match=r"reward\.http\.key_variable: given 'NO_SUCH_KEY', which is not set"):
        check(RewardConfig(name="http", http=http))
