"""Engines by name, and by a path outside the package. A whole run with one: tests/end_to_end/test_third_engine.py."""

from pathlib import Path

import pytest

from megatron_hpt.engines.interface import EngineKind
from megatron_hpt.engines.registry import ENGINES, kind_of
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
