"""An engine from outside the package: its server repeats recorded answers, and only notes which weights it would have.

``rollout.engine=recorded_engine.py:RECORDED``. As a program, ``recorded_engine.py RECORDED_JSON PORT``, it is the server.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_hpt.config import Config
from megatron_hpt.engines.client import HttpEngine
from megatron_hpt.engines.interface import EngineKind, SamplingLimits, Start
from megatron_hpt.engines.types import Sample, SamplingRequest, Span
from megatron_hpt.environment import inherited_here
from megatron_hpt.process import token
from megatron_hpt.transfer.control import EngineControl, Memory, ServerLoad
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest, as_version

RECORD = "recorded.json"
"""File in the model's folder: tokens of a prompt, as JSON → its answers, each tokens and log-probabilities."""


class RecordedClient(HttpEngine):
    """The coordinator's side."""

    generate_route = "/generate"
    version_route = "/weights"

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        return {"prompt": request.tokens, "samples": request.samples, "seed": request.seed}

    def samples(self, answer: Any) -> list[Sample]:
        return [self.whole_sample(tokens, logprobs, "stop", [Span(version, 0)]) for tokens, logprobs, version in answer]


class RecordedControl(EngineControl):
    """The trainer's side: every call is a line of the server's log."""

    def prepare(self, contents: Contents) -> None:
        self._note("prepare")

    def _update(self, manifest: Manifest) -> dict[str, float]:
        self._note(f"version {manifest.version}")
        return {"receive": 0.0, "load": 0.0}

    def compare(self, contents: Contents, manifest: Manifest) -> None:
        self._note("compare")

    def pause(self) -> None:
        self._note("pause")

    def resume(self) -> None:
        self._note("resume")

    def _sleep(self) -> None:
        self._note("sleep")

    def _wake(self, memory: Memory) -> None:
        self._note(f"wake {memory.value}")

    def version(self) -> int | None:
        return as_version(self._call("GET", "/weights").json()["weight_version"])

    def load(self) -> ServerLoad:
        return ServerLoad(0, 0, 0.0)

    def layout(self) -> EngineLayout:
        return EngineLayout(1)

    def _note(self, action: str) -> None:
        self._call("POST", "/note", json=action)


def command(config: Config, python: str, start: Start) -> list[str]:
    return [python, __file__, str(Path(start.model) / RECORD), str(start.port)]


def client(config: Config, url: str, own: str | None = None) -> RecordedClient:
    return RecordedClient(url, config.deadlines.rollout_s, config.deadlines.silent_s, own=own)


RECORDED = EngineKind(
    name="recorded",
    title="Recorded",
    packages=(),
    plugin_group="",
    install="nothing",
    python=lambda: sys.executable,
    command=command,
    environment=lambda config, on_gpus: inherited_here(),
    argument_check="",
    client=client,
    control=RecordedControl,
    recognise=lambda url, http: None,
    limits=SamplingLimits(coldest=1.0, hottest=1.0),
    workspace_bytes=lambda share: 0.0,
)


class Handler(BaseHTTPRequestHandler):
    """The server's side."""

    answers: dict[str, list[tuple[list[int], list[float]]]]
    version = "none yet"

    def do_GET(self) -> None:
        self._answer({"weight_version": Handler.version})

    def do_POST(self) -> None:
        if self.headers["Authorization"] != f"Bearer {token()}":
            self.send_error(401)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/note":
            print(f"told: {body}", flush=True)
            Handler.version = body.removeprefix("version ") if body.startswith("version ") else Handler.version
            self._answer(None)
        else:
            found = self.answers[json.dumps(body["prompt"])]
            chosen = [found[(body["seed"] + index) % len(found)] for index in range(body["samples"])]
            self._answer([(*answer, Handler.version) for answer in chosen])

    def _answer(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


if __name__ == "__main__":
    Handler.answers = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
