"""`model.overrides` on the contents of a config.json, and as every reader of the file then understands it."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen2Config

from megatron_hpt.config import Config, DataConfig, ModelConfig
from megatron_hpt.errors import ConfigError, ModelError
from megatron_hpt.models.hf_config import model_shape, read_config, run_shape, shape_of_any
from megatron_hpt.models.overrides import overridden

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
}
FILE = Path("model/config.json")
LINEAR = {"rope_type": "linear", "factor": 2.0}
THETA = st.floats(1.0, 1e8) | st.integers(1, 10**8)
SCALING = st.builds(lambda factor: {"rope_type": "linear", "factor": factor}, st.floats(1.5, 64))


def nested(theta: float | None, scaling: dict | None) -> dict:
    """As transformers 5 writes it."""
    return {"rope_type": "default", **(scaling or {}), **({} if theta is None else {"rope_theta": theta})}


@st.composite
def rotary_keys(draw: st.DrawFn) -> dict:
    """How published files say it: nothing, the old keys, the new one, the new one beside an old one."""
    theta, scaling = draw(st.none() | THETA), draw(st.none() | SCALING)
    old = {**({} if theta is None else {"rope_theta": theta}), "rope_scaling": scaling}
    new = {"rope_parameters": nested(theta, scaling)}
    return draw(st.sampled_from([{}, old, new, {**new, **({} if theta is None else {"rope_theta": theta})}]))


def as_transformers_5(config: dict) -> tuple[float, str, float | None]:
    """(base, kind, factor) that transformers computes with."""
    rope = LlamaConfig(**copy.deepcopy(config)).rope_parameters  # it changes what it is given
    return rope["rope_theta"], rope["rope_type"], rope.get("factor")


def as_before(config: dict) -> tuple[float, str, float | None]:
    """The same, read as transformers 4 does: two keys of their own, the base 10000 where there is none."""
    scaling = config.get("rope_scaling") or {}
    return config.get("rope_theta", 10000.0), scaling.get("rope_type", "default"), scaling.get("factor")


@given(rotary_keys(), THETA)
def test_another_base_is_everybodys_and_the_scaling_stays(keys: dict, theta: float) -> None:
    config = {**LLAMA, **keys}
    changed = overridden(config, {"rope_theta": theta}, FILE)
    assert as_transformers_5(changed) == as_before(changed) == (theta, *as_transformers_5(config)[1:])


@given(rotary_keys(), st.none() | SCALING, st.sampled_from(["rope_parameters", "rope_scaling"]), st.none() | THETA)
def test_another_scaling_is_everybodys_and_the_base_stays(keys: dict, scaling: dict | None, key: str, theta: float) -> None:
    config = {**LLAMA, **keys}
    changed = overridden(config, {key: scaling, **({} if theta is None else {"rope_theta": theta})}, FILE)
    kind, factor = (scaling["rope_type"], scaling["factor"]) if scaling else ("default", None)
    expected = (as_transformers_5(config)[0] if theta is None else theta, kind, factor)
    assert as_transformers_5(changed) == as_before(changed) == expected


@given(rotary_keys(), THETA, st.integers(1, 10**6))
def test_nothing_else_changes_and_twice_is_once(keys: dict, theta: float, positions: int) -> None:
    config = {**LLAMA, **keys}
    overrides = {"rope_theta": theta, "max_position_embeddings": positions}
    changed = overridden(config, overrides, FILE)
    assert overridden(changed, overrides, FILE) == changed
    touched = {*overrides, "rope_parameters", "rope_scaling"}
    assert {k: v for k, v in changed.items() if k not in touched} == {k: v for k, v in config.items() if k not in touched}
    assert changed["max_position_embeddings"] == positions
    assert overridden(config, {}, FILE) == config
    assert set(overridden(config, {"use_cache": False}, FILE)) == set(config)  # rotary keys only where one is meant


def test_the_old_key_of_a_scaling_kind_is_understood() -> None:
    changed = overridden({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 40000}, FILE)
    assert as_transformers_5(changed) == (40000, "linear", 2.0)
    assert changed["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_a_null_in_the_file_can_become_a_value_and_the_other_way_round() -> None:
    config = {**LLAMA, "sliding_window": None, "pad_token_id": None, "head_dim": 16}
    changed = overridden(config, {"sliding_window": 8, "pad_token_id": 3, "head_dim": None}, FILE)
    assert (changed["sliding_window"], changed["pad_token_id"], changed["head_dim"]) == (8, 3, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_tetha": 4e4}, r"rope_tetha: model/config\.json has no such key; did you mean model\.overrides\.rope_theta\?"),
        ({"max_positions": 9}, r"max_positions: model/config\.json has no such key"),
        ({"model_type": "mistral"}, r"model_type: cannot be overridden: it says which model the weights are of"),
        ({"architectures": []}, r"architectures: cannot be overridden"),
        ({"auto_map": {}}, r"auto_map: cannot be overridden: it names code"),
        ({"dtype": "bfloat16"}, r"dtype: cannot be overridden: set model\.dtype"),
        ({"torch_dtype": "bfloat16"}, r"torch_dtype: cannot be overridden: set model\.dtype"),
        ({"quantization_config": None}, r"quantization_config: cannot be overridden: it belongs to the weights"),
        ({"max_position_embeddings": "many"}, r"max_position_embeddings: given 'many'; it is a number in model/config\.json"),
        ({"max_position_embeddings": True}, r"max_position_embeddings: given True; it is a number"),
        ({"use_cache": 1}, r"use_cache: given 1; it is true or false"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps: given '1e-6'; it is a number"),
        ({"head_dim": "wide"}, r"head_dim: given 'wide'; it is a number"),
        ({"rope_theta": "40000"}, r"rope_theta: given '40000'; it is a number"),
        ({"rope_theta": 0}, r"rope_theta: given 0; it is a positive number"),
        ({"rope_theta": float("nan")}, r"rope_theta: given nan; it is a positive number"),
        ({"rope_theta": None}, r"rope_theta: given None; it is a positive number"),
        ({"rope_scaling": "linear"}, r"rope_scaling: given 'linear'; it is a mapping"),
        ({"rope_scaling": {"rope_theta": "big"}}, r"rope_theta: given 'big'; it is a positive number"),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR}, r"rope_scaling: is the same as rope_parameters; give one"),
        (
            {"rope_theta": 4e4, "rope_parameters": {"rope_theta": 5e4}},
            r"rope_theta: given 40000\.0, and 50000\.0 inside",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.overrides\." + message):
        overridden(LLAMA, overrides, FILE)


def test_readers_of_a_folder_take_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "rope_parameters": nested(1e4, None)}))
    overrides = {"rope_theta": 40000, "max_position_embeddings": 128}
    for shape in (model_shape(tmp_path, overrides), shape_of_any(tmp_path, overrides)):
        assert (shape.rope_theta, shape.max_positions) == (40000.0, 128)
    assert (model_shape(tmp_path).rope_theta, model_shape(tmp_path).max_positions) == (10000.0, 64)
    assert read_config(tmp_path, overrides)["rope_parameters"]["rope_theta"] == 40000
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_act": "silu"}))
    with pytest.raises(ModelError, match="hidden_act = 'gelu' changes the computation"):  # checked as if it were in the file
        model_shape(tmp_path, {"hidden_act": "gelu"})


def test_what_the_seed_edits_by_hand_in_qwen2_5_math(tmp_path: Path) -> None:
    """Its published config.json as far as it is read here; sizes of the 1.5B model."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 4096,
        "max_window_layers": 21,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    overrides = {"rope_theta": 40000, "max_position_embeddings": 16384}
    shape = model_shape(tmp_path, overrides)
    assert (shape.rope_theta, shape.max_positions, shape.rope_scaling) == (40000.0, 16384, None)
    read = Qwen2Config(**read_config(tmp_path, overrides))
    assert (read.rope_parameters["rope_theta"], read.max_position_embeddings) == (40000, 16384)
    assert set(read.layer_types) == {"full_attention"}


def test_they_are_the_actors_and_no_other_models(tmp_path: Path) -> None:
    for name in ("actor", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "link").symlink_to(tmp_path / "actor")
    model = ModelConfig(path=str(tmp_path / "actor"), overrides={"rope_theta": 40000})
    config = Config(name="x", model=model, data=DataConfig(train=""))
    assert run_shape(config).rope_theta == 40000
    assert run_shape(config, str(tmp_path / "link")).rope_theta == 40000
    assert run_shape(config, str(tmp_path / "other")).rope_theta == 10000
