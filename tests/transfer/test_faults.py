"""What goes wrong with real engines: a typed error in time, old weights or none are served, and the next transfer succeeds."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_hpt.errors import DeadlineError, TransferError
from megatron_hpt.process import token_header
from megatron_hpt.transfer.control import InFlight
from megatron_hpt.transfer.transports import collective
from tests import programs
from tests.engine_servers import PROMPTS, Server, SharedEngines

from .trainers import Trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DEADLINE_S = 6.0


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest, shared_engines: SharedEngines) -> Server:
    """One that other tests use too, and trust to serve whoever sends it weights next."""
    found = shared_engines.server(request.param)
    Versions.last = max(Versions.last, found.control().version() or 0)
    return found


class Versions:
    """Numbers that only grow, over the tests of one engine."""

    last = 0

    @classmethod
    def next(cls) -> int:
        cls.last += 1
        return cls.last


def served(server: Server) -> list | None:
    """Greedy answers now; None where the engine is paused."""
    try:
        body = (
            {"token_ids": PROMPTS[0], "sampling_params": {"temperature": 0.0, "max_tokens": 4, "detokenize": False}}
            if server.kind == "vllm"
            else {"input_ids": PROMPTS[0], "sampling_params": {"temperature": 0.0, "max_new_tokens": 4}}
        )
        route = "/inference/v1/generate" if server.kind == "vllm" else "/generate"
        answer = httpx.post(server.url + route, json=body, timeout=3, trust_env=False, headers=token_header()).json()
    except httpx.ReadTimeout:
        return None
    return answer["choices"][0]["token_ids"] if server.kind == "vllm" else answer["output_ids"]


@pytest.fixture
def trainer(server: Server):
    """A trainer that has published once; whatever the test does, its next version arrives and is what is served."""
    trainer = Trainer(server.config, [server.url], DEADLINE_S)
    trainer.sender.publish(Versions.next())
    old = served(server)
    yield trainer
    assert served(server) in (old, None), "neither the old version nor nothing"
    assert (server.control().version() or 0) <= Versions.last, "a version that did not arrive"
    again = Trainer(server.config, [server.url], 60.0)
    again.scale(3.0)
    again.sender.publish(Versions.next())
    assert server.control().version() == Versions.last
    assert served(server) is not None
    again.sender.publish(Versions.next())
    again.close()
    trainer.close()
    assert "memfd:megatron_hpt" not in Path("/proc/self/maps").read_text(encoding="utf-8"), "memory of a sender that was closed"


def raises_in_time(kind: type[Exception], match: str, action, deadline_s: float = 2 * DEADLINE_S + 3) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=match):
        action()
    assert time.monotonic() - started < deadline_s


def test_who_has_not_the_token_changes_nothing_and_samples_nothing(server: Server, trainer: Trainer) -> None:
    routes = ("/update_weights", "/collective_rpc", "/pause", "/inference/v1/generate", "/weight_info")
    if server.kind == "sglang":
        routes = ("/update_weights_from_tensor", "/pause_generation", "/generate", "/model_info")
    for route in routes:
        for header in ({}, {"Authorization": "Bearer another"}):
            method = "GET" if route.endswith("_info") else "POST"
            assert httpx.request(method, server.url + route, headers=header, trust_env=False).status_code == 401
    assert "a secret" not in "".join(" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))


def test_sleeping_and_waking(server: Server, trainer: Trainer) -> None:
    """On the host the memory stays; that the engines take these calls in this order, and then serve, is what a run needs."""
    sleeper = Trainer(server.config, [server.url], 60.0, sleep=True)
    before, weights = served(server), {name: tensor.clone() for name, tensor in sleeper.weights.items()}
    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(long_request, server) for _ in range(8)]
        time.sleep(0.05)
        sleeper.sender.sleep()
        sleeper.scale(2.0)
        sleeper.sender.publish(Versions.next())
        assert served(server) is None
        sleeper.sender.serve()
        assert {request.result(20) for request in under_way} <= {"abort", "length"}
    assert served(server) not in (before, None)
    sleeper.sender.sleep()
    for name, tensor in sleeper.weights.items():
        tensor.copy_(weights[name])
    sleeper.sender.publish(Versions.next())
    sleeper.sender.serve()
    assert served(server) == before
    sleeper.close()


def long_request(server: Server) -> str:
    """Why a request ended."""
    tokens = 50
    if server.kind == "vllm":
        sampling = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
        route, body = "/inference/v1/generate", {"token_ids": PROMPTS[0], "sampling_params": sampling}
    else:
        sampling = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
        route, body = "/generate", {"input_ids": PROMPTS[0], "sampling_params": sampling}
    answer = httpx.post(server.url + route, json=body, timeout=30, trust_env=False, headers=token_header()).json()
    return answer["choices"][0]["finish_reason"] if server.kind == "vllm" else answer["meta_info"]["finish_reason"]["type"]


def test_load_of_an_engine(server: Server, trainer: Trainer) -> None:
    load = server.control().load()
    assert (load.running, load.waiting) == (0, 0)
    assert 0 <= load.cache < 1


def tool(*arguments: str) -> subprocess.CompletedProcess:
    return programs.tool("weight_transfer.py", *arguments)


def test_the_tool_pushes_verifies_and_watches(server: Server, trainer: Trainer) -> None:
    model, version = server.config.model.path, Versions.next()
    pushed = tool("push", model, "--to", server.url, "--version", str(version))
    assert pushed.returncode == 0, pushed.stderr
    assert f"{server.url} serves version {version}" in pushed.stdout
    verified = tool("verify", model, server.url)
    assert verified.returncode == 0, verified.stderr
    assert f"all {len(trainer.weights)} tensors" in verified.stdout
    trainer.scale(2.0)
    trainer.sender._driver.prepared.clear()  # the tool has taken the engine over
    trainer.sender.publish(Versions.next())
    differs = tool("verify", model, server.url)
    assert differs.returncode == 1
    assert "model.embed_tokens.weight at (0, 0): the engine's weights are not those that were sent" in differs.stderr
    watched = tool("watch", server.url, "http://127.0.0.1:9", "--times", "1")
    assert str(Versions.last) in watched.stdout
    assert "cannot be reached" in watched.stdout
    trainer.scale(0.5)
    trainer.sender.publish(Versions.next())


def test_a_flipped_bit(trainer: Trainer) -> None:
    sink = trainer.sender._staging.sink
    original = sink.commit

    def flip(version: int) -> None:
        original(version)
        sink._segment.bytes[sink.positions[5]] ^= 4

    sink.commit = flip
    raises_in_time(TransferError, "arrived damaged", lambda: trainer.sender.publish(Versions.next()))


def test_a_lost_message(server: Server, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    talking = Trainer(server.config, [server.url], DEADLINE_S, transport="gloo")
    original, count = collective.Meeting.send, iter(range(10**6))
    nothing = type("Nothing", (), {"wait": lambda *_: None})()
    monkeypatch.setattr(collective.Meeting, "send", lambda self, *a: nothing if next(count) == 4 else original(self, *a))
    raises_in_time((TransferError, DeadlineError), "within 6 s", lambda: talking.sender.publish(Versions.next()), 30)
    talking.close()


@pytest.mark.parametrize(("transport", "calls"), [("gloo", 3), ("shared_memory", 4), ("shared_memory", 6)])
def test_a_trainer_that_is_killed(server: Server, trainer: Trainer, transport: str, calls: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("trainers.py")), server.kind, server.config.model.path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [server.url, transport, str(Versions.next()), str(calls)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    Versions.last -= 1


def test_an_engine_that_hangs(server: Server, trainer: Trainer) -> None:
    processes = [p for p in psutil.Process(server.process.pid).children(recursive=True) if "tracker" not in p.name()]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        raises_in_time(DeadlineError, rf"engine {server.url} did not answer", lambda: trainer.sender.publish(Versions.next()))
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
        Versions.last -= 1
    time.sleep(1)


def test_a_full_disk(server: Server, trainer: Trainer, tmp_path: Path) -> None:
    writing = Trainer(server.config, [server.url], DEADLINE_S, transport="files", folder=str(tmp_path / "versions"))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        raises_in_time(TransferError, "could not be written to", lambda: writing.sender.publish(Versions.next()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        Versions.last -= 1
    assert not list(tmp_path.glob("versions/**/*.safetensors"))
    writing.close()


def test_two_trainers(server: Server, trainer: Trainer) -> None:
    other = Trainer(server.config, [server.url], DEADLINE_S)
    other.sender.publish(Versions.next())
    raises_in_time(TransferError, "has taken it over", lambda: trainer.sender.publish(Versions.next()))
    Versions.last -= 1
    other.close()


def test_requests_under_way(server: Server, trainer: Trainer) -> None:
    """Kept, computed again or aborted, as the trainer was told; none is lost."""
    for mode in InFlight:
        answers: list[httpx.Response] = []
        ask = threading.Thread(target=lambda found=answers: found.append(_long(server)))
        ask.start()
        time.sleep(0.15)
        trainer.sender._driver.targets[0].control._in_flight = mode
        trainer.sender.publish(Versions.next())
        ask.join(60)
        assert answers
        assert answers[0].status_code == 200


def _long(server: Server) -> httpx.Response:
    if server.kind == "vllm":
        sampling = {"temperature": 1.0, "max_tokens": 50, "ignore_eos": True, "n": 8, "detokenize": False}
        route, body = "/inference/v1/generate", {"token_ids": PROMPTS[0], "sampling_params": sampling}
    else:
        sampling = {"temperature": 1.0, "max_new_tokens": 50, "ignore_eos": True}
        route, body = "/generate", {"input_ids": [PROMPTS[0]] * 8, "sampling_params": [sampling] * 8}
    return httpx.post(server.url + route, json=body, timeout=60, trust_env=False, headers=token_header())


def test_memory_does_not_grow_over_100_transfers(server: Server, trainer: Trainer) -> None:
    def resident() -> list[int]:
        processes = [psutil.Process(), *psutil.Process(server.process.pid).children(recursive=True)]
        return [process.memory_info().rss for process in processes]

    after = {}
    for turn in range(100):
        trainer.sender.publish(Versions.next())
        if turn in (39, 99):
            after[turn] = resident()
    grown = [b - a for a, b in zip(after[39], after[99], strict=True)]
    assert max(grown) < 12 * 2**20, grown
    assert len(os.listdir("/proc/self/fd")) < 200


def test_an_engine_that_is_killed_and_comes_back(server: Server, shared_engines: SharedEngines) -> None:
    """Last: later tests get the new one. The trainer goes on without it, and gives the new one the version that it lacks."""
    trainer = Trainer(server.config, [server.url], DEADLINE_S, transport="gloo")
    trainer.sender.publish(Versions.next())
    original = collective.Meeting.send

    def slow(self, *arguments):
        time.sleep(0.05)
        return original(self, *arguments)

    collective.Meeting.send = slow
    try:
        killing = threading.Timer(0.4, server.kill)
        killing.start()
        started = time.monotonic()
        trainer.sender.publish(Versions.next())
        assert time.monotonic() - started < 3 * DEADLINE_S
    finally:
        collective.Meeting.send = original
    assert not trainer.sender._driver.prepared
    killing.join()
    back = server.again()
    shared_engines.replace(back)
    back.ready()
    trainer.sender.renew(server.url)
    assert back.control().version() == Versions.last
    assert served(back) is not None
    trainer.close()
