"""Reading a model folder: what is refused before any weight is read."""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_hpt.engines.sglang.server import ENVIRONMENT
from megatron_hpt.errors import ModelError
from megatron_hpt.examples.tiny_families import MODELS
from megatron_hpt.models import hf_config
from megatron_hpt.models.hf_config import SUPPORTED, LinearScaling, Llama3Scaling, model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes

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
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MISTRAL = {**LLAMA, "model_type": "mistral"}
QWEN2 = {**LLAMA, "model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "sliding_window": None, "use_sliding_window": False}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def folder(tmp_path: Path, base: dict = LLAMA, **change) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**base, **change}))
    return tmp_path


@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_those_that_transformers_writes(tmp_path: Path, model: str) -> None:
    MODELS[model](tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        real = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_tensor_shapes(model_shape(tmp_path / "model")) == real


def test_shape_of_a_qwen3(tmp_path: Path) -> None:
    dense = model_shape(folder(tmp_path, QWEN3))
    assert (dense.qk_norm, dense.head_dim, dense.ffn, dense.experts) == (True, 32, 128, 0)
    sparse = model_shape(folder(tmp_path, QWEN3_MOE))
    assert (sparse.qk_norm, sparse.head_dim, sparse.ffn, sparse.experts) == (True, 32, 48, 4)
    assert (sparse.experts_per_token, sparse.norm_topk_prob) == (2, True)


def test_what_of_a_qwen3_is_absent_has_the_default_of_transformers(tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN3_MOE.items() if key not in ("norm_topk_prob", "decoder_sparse_step")}
    assert not model_shape(folder(tmp_path, config)).norm_topk_prob
    assert model_shape(folder(tmp_path, QWEN3, sliding_window=4096)) == model_shape(folder(tmp_path, QWEN3))


def test_experts_are_counted_under_the_published_key_and_that_of_transformers_5(tmp_path: Path) -> None:
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in QWEN3_MOE.items()}
    assert model_shape(folder(tmp_path, renamed)).experts == 4
    with pytest.raises(ModelError, match=r"config\.json: num_experts = 4 and num_local_experts = 8 contradict each other"):
        model_shape(folder(tmp_path, QWEN3_MOE, num_local_experts=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
            "rope_type = 'yarn' .* supported: default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "factor of rope_type 'llama3' is None; expected"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_parameters = .* and rope_scaling = .* contradict each other",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM of llama is supported"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map = .* changes the computation"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, r"mrope_section = \[1, 2\] of the rotary embedding"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention = .* of the rotary embedding changes"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": True}},
            "factor of rope_type 'linear' is True; expected a positive",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA_3, "low_freq_factor": 4.0}},
            "low_freq_factor = 4.0 of rope_type 'llama3' must be below high_freq_factor = 4.0",
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_parameters = .* and rope_scaling = .* contradict each other",  # transformers takes the base of Llama
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta = 10000.0 contradicts .* 1000000.0"),
        (
            {"original_max_position_embeddings": 64, "rope_parameters": {"rope_type": "llama3", **LLAMA_3}},
            "original_max_position_embeddings = 64 contradicts .* 8192",
        ),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; expected a positive number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; expected a positive number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ({"num_attention_heads": 6}, "num_attention_heads = 6 does not divide hidden_size = 64, and there is no head_dim"),
        ({"head_dim": 15}, "head_dim = 15 is odd"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types = \['sliding_attention'\] changes"),
        ({"bias": True}, "bias = True changes"),
        ({"sliding_window": 32}, "sliding_window = 32 is below max_position_embeddings = 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; expected a positive integer"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_shape(folder(tmp_path, **change))


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            QWEN3,
            {"use_sliding_window": True, "sliding_window": 48},
            "sliding_window = 48 is below max_position_embeddings = 64",
        ),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = \['sliding_attention'\] changes"),
        (QWEN3, {"attention_bias": True}, "attention_bias = True changes"),
        (QWEN3, {"head_dim": None}, "head_dim is None; expected a positive integer"),
        (QWEN3, {"num_key_value_heads": None}, "num_key_value_heads is None; expected a positive integer"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 1}, "sliding_window = 1 is below"),
        (QWEN2, {"attention_bias": True}, "attention_bias = True changes"),
        (QWEN2, {"use_mrope": True}, "use_mrope = True changes"),
        (
            MISTRAL,
            {"max_position_embeddings": 32768},
            "sliding_window = 4096 is below .*model.overrides.max_position_embeddings=4096",
        ),
        (MISTRAL, {"num_key_value_heads": None}, "num_key_value_heads is None"),
        (QWEN3_MOE, {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\] changes"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 changes"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts is 0; expected a positive integer"),
        (QWEN3_MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok is 5; there are only 4 experts"),
        (QWEN3_MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 with normalised probabilities"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size is None; expected a positive integer"),
        (MIXTRAL, {"sliding_window": 16, "use_sliding_window": False}, "sliding_window = 16 is below"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 changes"),
    ],
)
def test_what_other_families_do_not_support_is_refused(tmp_path: Path, base: dict, change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json: " + message):
        model_shape(folder(tmp_path, base, **change))


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}}, 5e5, Llama3Scaling(**LLAMA_3)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3}}, 5e5, Llama3Scaling(**LLAMA_3)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, LinearScaling(2)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_scaling": None}, 1e4, None),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
                "rope_theta": 5e5,
            },
            5e5,
            LinearScaling(2),
        ),
    ],
)
def test_rotary_embeddings_in_both_spellings(tmp_path: Path, config: dict, theta: float, scaling: object) -> None:
    shape = model_shape(folder(tmp_path, **config))
    assert (shape.rope_theta, shape.rope_scaling) == (theta, scaling)


def test_a_window_that_no_sequence_reaches_changes_nothing(tmp_path: Path) -> None:
    plain = model_shape(folder(tmp_path, MISTRAL, sliding_window=None))
    assert model_shape(folder(tmp_path, MISTRAL)) == plain  # 4096, above the 64 positions
    assert model_shape(folder(tmp_path, MISTRAL, sliding_window=64)) == plain
    of_layers = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}
    assert model_shape(folder(tmp_path, QWEN2, **of_layers)) == model_shape(folder(tmp_path, QWEN2))
    long = folder(tmp_path, MISTRAL, max_position_embeddings=32768)
    assert model_shape(long, {"max_position_embeddings": 4096}).max_positions == 4096


CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
READ = {
    *SIZES,
    *("moe_intermediate_size", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
    *(
        "architectures",
        "layer_types",
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "sliding_window",
        "use_sliding_window",
    ),
}
HARMLESS = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("pretraining_tp", "target_layer_count"),  # how a projection was cut once
    "attention_dropout",  # no dropout here, as when the model is evaluated
    "max_window_layers",  # which layers a window is of
    *("output_router_logits", "router_aux_loss_coef"),  # an auxiliary loss, which there is none of
    *("_attn_implementation", "chunk_size_feed_forward"),  # how, not what
    *("transformers_version", "return_dict", "output_hidden_states", "dtype"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type"),  # of other architectures
}
OPTIONAL = re.compile(r"(?:getattr|hasattr)\(\s*(?:self\.)?config,\s*[\"'](\w+)[\"']")
"""A key that code looks for and does without."""
SPELLINGS = {"rope_theta", "rope_scaling", "original_max_position_embeddings"}
"""Of rotary parameters, beside `rope_parameters`: must not contradict them."""
ENGINES = {
    "vllm": (Path(sys.prefix), "vllm/model_executor/models"),
    "sglang": (Path(sys.prefix).with_name(ENVIRONMENT), "sglang/srt/models"),
}
"""Environment and folder of an engine's models."""


def known(family: str) -> set[str]:
    return READ | HARMLESS | set(hf_config._ACCEPTED) | set(hf_config._FAMILIES[family].accepted)


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_key_of_transformers_is_known(family: str) -> None:
    """A release of transformers that gives a family a new key fails here, before anybody trains without it."""
    assert not {field.name for field in dataclasses.fields(CONFIGS[family])} - known(family)
    code = inspect.getsource(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    read = set(re.findall(r"\bconfig\.(\w+)", code)) | set(OPTIONAL.findall(code))
    assert {"hidden_size", "rms_norm_eps"} <= read
    assert not read - known(family)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", SUPPORTED)
def test_every_key_that_an_engine_looks_for_is_known(engine: str, family: str) -> None:
    """An engine that computes something else where config.json has a key that transformers ignores."""
    environment, models = ENGINES[engine]
    files = list(environment.glob(f"lib/python3*/site-packages/{models}/{family}.py"))
    if not files:
        pytest.skip(f"{engine} is not installed")
    assert not set(OPTIONAL.findall(files[0].read_text())) - known(family) - SPELLINGS


@pytest.mark.parametrize("family", SUPPORTED)
def test_absent_keys_mean_what_they_mean_to_transformers(tmp_path: Path, family: str) -> None:
    base = {key: value for key, value in QWEN3_MOE.items() if key not in ("sliding_window", "use_sliding_window")}
    shape = model_shape(folder(tmp_path, {**base, "model_type": family, "num_local_experts": 4}))
    theirs = CONFIGS[family].from_pretrained(tmp_path)
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (shape.norm_eps, shape.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert (shape.head_dim, shape.kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)


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


LLAMA_3_2 = {"rope_type": "llama3", **LLAMA_3, "factor": 32.0}
QWEN_2_5 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "use_mrope": False, "use_sliding_window": False}
PUBLISHED = {
    "Llama-2-7b": {**LLAMA, "num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None, "rms_norm_eps": 1e-5},
    "Llama-3.2-1B": {**LLAMA, "rope_scaling": LLAMA_3_2, "rope_theta": 5e5, "attention_bias": False, "mlp_bias": False},
    "Mistral-7B-v0.3": {**MISTRAL, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None},
    "Mixtral-8x7B-v0.1": {**MIXTRAL, "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None},
    "Qwen2.5-Math-7B": {**LLAMA, **QWEN_2_5, "max_window_layers": 28, "rope_theta": 10000, "sliding_window": 4096},
    "SmolLM2-135M": {**LLAMA, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
}
"""config.json of published models, with other sizes: their keys and the values that are not sizes."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read(tmp_path: Path, name: str) -> None:
    architecture = CONFIGS[PUBLISHED[name]["model_type"]].__name__.replace("Config", "ForCausalLM")
    assert model_shape(folder(tmp_path, PUBLISHED[name], architectures=[architecture], torch_dtype="bfloat16"))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "docs" / "models").iterdir()), ids=lambda path: path.name)
def test_models_to_plan_with_are_read(path: Path) -> None:
    assert model_shape(path)
