"""Engines by name, and by a path outside the package. A whole run with one: tests/end_to_end/test_third_engine.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_hpt.engines.interface import EngineKind
from megatron_hpt.engines.registry import ENGINES, kind_of
from megatron_hpt.engines.running import look
from megatron_hpt.errors import ConfigError

OUTSIDE = Path(__file__).with_name("recorded_engine.py")


def test_an_engine_is_a_row_or_somebody_elses() -> None:
    assert [kind_of(name).name for name in ENGINES] == list(ENGINES)
    for path in (f"{OUTSIDE}:RECORDED", "tests.engines.recorded_engine:RECORDED"):
        assert isinstance(kind_of(path), EngineKind)
        assert kind_of(path).name == "recorded"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vlm", r"rollout\.engine: given 'vlm'; allowed: vllm, sglang, or package\.module:NAME .*; did you mean 'vllm'\?"),
        ("mine", r"rollout\.engine: given 'mine'; allowed: vllm, sglang, or package\.module:NAME of an EngineKind$"),
        (f"{OUTSIDE}:RECORD", r"'.*:RECORD' is a str, not a megatron_hpt\.engines\.interface\.EngineKind"),
        ("nowhere.engine:NAME", r"rollout\.engine: 'nowhere\.engine:NAME' cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_is_no_engine_is_refused_in_words(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        kind_of(name)


@pytest.mark.parametrize(
    ("routes", "kind"),
    [
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "a gateway"}]}}, "vllm"),
        ({"/v1/models": {"data": [{"id": "m"}]}, "/model_info": {"model_path": "m", "weight_version": "default"}}, "sglang"),
    ],
)
def test_a_server_is_what_its_routes_say_whoever_it_says_it_is(routes: dict[str, dict], kind: str) -> None:
    """SGLang has OpenAI's routes too, and what stands before a vLLM server may give another owner."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in routes else 404)
            self.end_headers()
            self.wfile.write(json.dumps(routes.get(self.path)).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert look(f"http://127.0.0.1:{server.server_port}").kind == kind
        finally:
            server.shutdown()
