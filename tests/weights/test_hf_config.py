"""Reading a model folder: what is refused before any weight is read."""

import json
from pathlib import Path

import pytest

from megatron_hpt.errors import ModelError
from megatron_hpt.weights.hf_config import model_shape
from megatron_hpt.weights.mapping import hf_tensor_shapes

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


def folder(tmp_path: Path, **change) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    return tmp_path


def test_shape_and_tensors_of_a_real_folder(tiny_model: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        real = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_tensor_shapes(model_shape(tiny_model)) == real


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling = 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope scaling = 'llama3'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected a positive integer"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_shape(folder(tmp_path, **change))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path: .*none is not a folder"):
        model_shape(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no model_type"):
        model_shape(tmp_path)


def test_rope_theta_old_and_new_place(tmp_path: Path) -> None:
    assert model_shape(folder(tmp_path, rope_theta=5e5)).rope_theta == 5e5
    assert model_shape(folder(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 7e5})).rope_theta == 7e5
