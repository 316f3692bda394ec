"""What sleeping engines are told, and in what order: the real sender and controls, before a server that notes calls."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from megatron_hpt.errors import TransferError
from megatron_hpt.examples import tiny_llama
from tests.engine_servers import engine_config

from .trainers import Trainer

SECONDS = {"receive": 0.1, "load": 0.1}


class Recorder(ThreadingHTTPServer):
    """The answers of an engine that everything works on; it notes what would change it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[str] = []
        self.version: str | None = None
        self.fails: set[str] = set()
        self.compared: list[tuple[int, bool]] = []
        """Versions that a vLLM server was sent, and whether it was told to compare its weights with them."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def take(self) -> list[str]:
        """Calls since the last time."""
        calls, self.calls = self.calls, []
        return calls

    def answer(self, route: str, query: dict[str, str], body: dict[str, Any]) -> Any:
        command = body.get("method", "")
        if route in ("/weight_info", "/model_info"):
            return {"weight_version": self.version}
        if route == "/server_info":
            return {"tp_size": 1, "pp_size": 1, "ep_size": 1}
        if command == "transfer_outcome":
            return {"results": [{"failure": "", "open": False, "seconds": SECONDS}]}
        if route == "/update_weight_version":
            self.version = body["new_version"]
        if route == "/update_weights":
            manifest = body["update_info"]["manifest"]
            self.compared.append((manifest["version"], manifest["compare"]))
        given = {**query, **{key: body[key] for key in ("tags", "mode") if key in body}}
        self.calls.append(" ".join([route, *(f"{key}={value}" for key, value in given.items())]))
        return {"success": True, "message": json.dumps(SECONDS)}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Recorder

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}"))

    def _answer(self, body: dict[str, Any]) -> None:
        parts = urlsplit(self.path)
        failed = parts.path in self.server.fails
        content = json.dumps(self.server.answer(parts.path, dict(parse_qsl(parts.query)), body)).encode()
        self.send_response(400 if failed else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    tiny_llama.write(folder, hidden=64, layers=2, heads=2, kv_heads=2, positions=64)
    return folder


@pytest.fixture
def recorders() -> Iterator[list[Recorder]]:
    found = [Recorder(), Recorder()]
    threads = [threading.Thread(target=recorder.serve_forever) for recorder in found]
    for thread in threads:
        thread.start()
    yield found
    for recorder, thread in zip(found, threads, strict=True):
        recorder.shutdown()
        recorder.server_close()
        thread.join()


@pytest.fixture(params=["vllm", "sglang"])
def trainer(request: pytest.FixtureRequest, model: Path, recorders: list[Recorder]) -> Iterator[Trainer]:
    found = Trainer(engine_config(request.param, model), [recorder.url for recorder in recorders], sleep=True)
    yield found
    found.close()


SLEEP = {
    "vllm": ["/sleep level=2 mode=abort"],
    "sglang": [
        "/pause_generation mode=abort",
        "/flush_cache timeout=3",
        "/release_memory_occupation tags=['weights', 'kv_cache']",
    ],
}
WEIGHTS = {"vllm": "/wake_up tags=weights", "sglang": "/resume_memory_occupation tags=['weights']"}
CACHE = {
    "vllm": ["/wake_up tags=kv_cache", "/resume"],
    "sglang": ["/resume_memory_occupation tags=['kv_cache']", "/continue_generation"],
}
PAUSE = {"vllm": "/pause mode=keep", "sglang": "/pause_generation mode=retract"}
OPENING = {"vllm": ["/init_weight_transfer_engine"], "sglang": ["/begin_weight_update", "/update_weights_from_tensor"]}


def test_an_engine_gives_memory_back_and_takes_it_in_two_parts(trainer: Trainer, recorders: list[Recorder]) -> None:
    kind = trainer.kind
    trainer.sender.sleep()
    trainer.sender.sleep()  # of a step whose version was not published: SGLang must not be told twice
    assert [recorder.take() for recorder in recorders] == [SLEEP[kind]] * 2
    trainer.sender.publish(1)
    for calls in (recorder.take() for recorder in recorders):
        assert calls[0] == WEIGHTS[kind]
        assert calls[1 : 1 + len(OPENING[kind])] == OPENING[kind]
        assert PAUSE[kind] in calls
        assert calls[-1].startswith("/update_weight_version")
        assert not set(CACHE[kind]) & set(calls)  # the trainer still has the memory that caches take
    trainer.sender.serve()
    assert [recorder.take() for recorder in recorders] == [CACHE[kind]] * 2
    trainer.sender.sleep()
    trainer.sender.publish(2)
    trainer.sender.serve()
    again = recorders[0].take()
    assert again[: len(SLEEP[kind]) + 1] == [*SLEEP[kind], WEIGHTS[kind]]
    assert again[-len(CACHE[kind]) :] == CACHE[kind]
    assert not set(OPENING["vllm"]) & set(again)  # it is still prepared


def test_an_engine_that_was_started_again_is_awake(trainer: Trainer, recorders: list[Recorder]) -> None:
    """It died asleep: SGLang would end a server that is woken without having slept."""
    kind, (dead, other) = trainer.kind, recorders
    trainer.sender.publish(1)
    trainer.sender.serve()
    trainer.sender.sleep()
    dead.take(), other.take()
    dead.version = None
    trainer.sender.renew(dead.url)
    calls = dead.take()
    assert calls[: len(OPENING[kind])] == OPENING[kind]
    assert calls[-1:] == CACHE[kind][-1:]
    assert not {WEIGHTS[kind], CACHE[kind][0]} & set(calls)
    assert other.take() == []


def test_one_that_is_gone_is_left_out_and_one_that_refuses_ends_the_run(trainer: Trainer, recorders: list[Recorder]) -> None:
    kind, (gone, other) = trainer.kind, recorders
    trainer.sender.publish(1)
    trainer.sender.serve()
    gone.shutdown()
    gone.server_close()
    other.take()
    trainer.sender.sleep()
    trainer.sender.publish(2)
    trainer.sender.serve()
    assert other.version == "2"
    assert other.take()[-1:] == CACHE[kind][-1:]
    trainer.sender.sleep()
    other.fails.add(WEIGHTS[kind].split()[0])
    with pytest.raises(TransferError, match=rf"{other.url} failed {WEIGHTS[kind].split()[0]}"):
        trainer.sender.publish(3)


@pytest.mark.parametrize(("sleep", "compared"), [(True, [1, 2, 3, 4]), (False, [1, 4])])
def test_weights_are_compared_whenever_they_have_slept(
    model: Path, recorders: list[Recorder], sleep: bool, compared: list[int]
) -> None:
    """Their memory was taken away and given back under CUDA graphs; else the first version is compared and every k-th."""
    trainer = Trainer(engine_config("vllm", model), [recorders[0].url], sleep=sleep, compare_every=4)
    for version in range(1, 5):
        trainer.sender.publish(version)
        trainer.sender.serve()
        trainer.sender.sleep()
    trainer.close()
    assert recorders[0].compared == [(version, version in compared) for version in range(1, 5)]


def test_without_sleep_nothing_of_it_is_said(model: Path, recorders: list[Recorder]) -> None:
    awake = Trainer(engine_config("vllm", model), [recorder.url for recorder in recorders])
    awake.sender.sleep()
    awake.sender.publish(1)
    awake.sender.serve()
    for calls in (recorder.take() for recorder in recorders):
        assert calls[-1] == "/resume"
        assert not any("sleep" in call or "wake" in call for call in calls)
    awake.close()
