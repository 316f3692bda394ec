"""What engines refuse or change, beside their own installed code."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.config import Config, DataConfig, EvaluationConfig, ModelConfig, RolloutConfig
from megatron_hpt.engines.checks import _check_engine_model, check_cache, check_sampling, check_temperature
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import ENGINES, interpreter
from megatron_hpt.errors import ConfigError, TransferError
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.plan.layout import _check_engine_tensor
from tests.engine_servers import skip_without

SAMPLED_AT = {
    "vllm": "from vllm.sampling_params import SamplingParams; asked = lambda t: SamplingParams(temperature=t)",
    "sglang": """
from sglang.srt.sampling.sampling_params import SamplingParams
def asked(t):
    found = SamplingParams(temperature=t)
    found.verify(100)
    return found
""",
}


def shape(heads: int, kv_heads: int, ffn: int, vocab: int, layers: int = 2) -> ModelShape:
    sizes = {"hidden": 16 * heads, "heads": heads, "kv_heads": kv_heads, "head_dim": 16, "ffn": ffn, "vocab": vocab}
    return ModelShape("llama", layers, **sizes, tied_embeddings=False, rope_theta=1e4, norm_eps=1e-5, max_positions=64)


def config(**rollout: object) -> Config:
    data = DataConfig(train="t", max_prompt_length=1000, max_response_length=3000)
    return Config(name="x", model=ModelConfig(path="m"), data=data, rollout=RolloutConfig(**rollout))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_samples_at_what_is_allowed_and_changes_or_refuses_what_is_not(engine: str) -> None:
    """Asks the installed engine, without starting it."""
    skip_without(engine)
    limits = ENGINES[engine].limits
    allowed = [limits.coldest, 1.0, limits.hottest or 1e6]
    refused = [limits.coldest * 0.99, *([limits.hottest * 1.01] if limits.hottest else [])]
    code = f"""
import sys
{SAMPLED_AT[engine]}
def as_asked(t):
    try:
        found = asked(t)
    except Exception:  # vLLM has a class of its own
        return False
    return found.temperature == t and getattr(found, "top_k", 0) != 1
print([as_asked(t) for t in {allowed + refused}])
"""
    wanted = config(engine=engine)
    environment = ENGINES[engine].environment(wanted, False)
    done = subprocess.run([interpreter(wanted), "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith(str([True] * len(allowed) + [False] * len(refused))), done.stderr[-2000:]
    for temperature in allowed:
        check_temperature("t", temperature, ENGINES[engine])
    for temperature in refused:
        with pytest.raises(ConfigError, match=r"^t: given "):
            check_temperature("t", temperature, ENGINES[engine])


def test_what_the_configuration_asks_for() -> None:
    check_sampling(config(samples_per_prompt=8, max_running=8))
    check_sampling(config(samples_per_prompt=9, max_running=8, engine="sglang"))  # a request each
    check_sampling(config(samples_per_prompt=9, max_running=8, urls=["http://x:1"]))  # nobody knows theirs
    evaluated = config().model_copy(update={"evaluation": EvaluationConfig(sets={"a": "a.parquet"}, temperature=0.005)})
    with pytest.raises(ConfigError, match=r"evaluation\.temperature: given 0\.005"):
        check_sampling(evaluated)
    with pytest.raises(ConfigError, match=r"rollout\.max_running=8: raise that"):
        check_sampling(config(samples_per_prompt=9, max_running=8))


@given(
    heads=st.sampled_from((2, 4, 6, 12)),
    group=st.sampled_from((1, 2, 3)),
    ffn=st.sampled_from((48, 60, 96)),
    vocab=st.integers(50, 400),
    tensor=st.integers(1, 12),
)
def test_an_accepted_layout_divides_what_engines_divide(heads: int, group: int, ffn: int, vocab: int, tensor: int) -> None:
    """Their assertions: models/llama.py, linear.py (divide), vocab_parallel_embedding.py."""
    model = shape(heads * group, heads, ffn, vocab)
    padded = (vocab + 63) // 64 * 64
    shared = heads % tensor == 0 or tensor % heads == 0
    fits = shared and not (model.heads % tensor or ffn % tensor or padded % tensor)
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=f"tensor_parallel: given {tensor}, which"):
        _check_engine_tensor(tensor, model)


def test_a_cache_that_holds_no_whole_sequence() -> None:
    wide = shape(32, 32, 64, 64, layers=400)  # 2 · 400 · 32 · 16 · 4 bytes a token: a GiB holds 655
    with pytest.raises(ConfigError, match=r"kv_cache_gib: given 1, which holds 655 tokens; .* may have 4000 .*at least 7"):
        check_cache(config(kv_cache_gib=1), wide)
    check_cache(config(kv_cache_gib=7), wide)


@pytest.mark.parametrize("engine", ENGINES)
def test_large_numbers_are_no_reason_to_refuse_a_server(engine: str, tmp_path: Path, tiny_model: Path) -> None:
    """vLLM wants a forward pass of as many tokens as sequences; numpy seeds below 2**32."""
    wanted = config(engine=engine, max_running=10_000)
    wanted.trainer.__dict__["seed"] = 2**40 + 3
    wanted.model.__dict__["path"] = str(tiny_model)
    command = ENGINES[engine].command(wanted, sys.executable, Start(str(tiny_model), 1, tmp_path, on_gpus=False))
    assert command[command.index({"vllm": "--seed", "sglang": "--random-seed"}[engine]) + 1] == "3"
    if engine == "vllm":
        assert command[command.index("--max-num-batched-tokens") + 1] == "10000"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("blocks", [None, [128, 128]])
def test_fp8_weights_that_an_engine_replaces_are_refused_by_name(
    tmp_path: Path, tiny_model: Path, engine: str, blocks: list[int] | None
) -> None:
    """SGLang's quantization/fp8.py: `layer.weight = Parameter(weight.t())`, which has no loader."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    contents = json.loads((tiny_model / "config.json").read_text())
    quantised = {"quant_method": "fp8", **({"weight_block_size": blocks} if blocks else {})}
    (folder / "config.json").write_text(json.dumps({**contents, "quantization_config": quantised}))
    wanted = config(engine=engine, model=str(folder))
    wanted.model.path = str(tiny_model)
    message = r"rollout\.model: .*fp8 is an FP8 checkpoint with a scale for each tensor, which sglang replaces .*\[128, 128\]"
    refused = engine == "sglang" and blocks is None
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        _check_engine_model(wanted, model_shape(tiny_model))


@pytest.mark.parametrize(
    ("quantization", "config_json", "refused"),
    [
        (None, {}, False),
        ("fp8", {"quant_method": "fp8"}, True),
        ("fp8", {}, True),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
    ],
)
def test_a_server_of_somebodys_own_is_refused_the_same(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_model: Path,
    quantization: str | None,
    config_json: dict,
    refused: bool,
) -> None:
    from megatron_hpt.engines.sglang.plugin import Endpoint

    parallel = SimpleNamespace(tp_size=1, pp_size=1, moe_ep_size=1, tp_rank=0, pp_rank=0)
    for name in ("sglang", "sglang.srt", "sglang.srt.runtime_context"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_parallel=lambda: parallel))
    contents = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**contents, **({"quantization_config": config_json} if config_json else {})})
    )
    model = SimpleNamespace(model_path=str(tmp_path), dtype="torch.bfloat16", quantization=quantization)
    with pytest.raises(TransferError, match="weight_block_size") if refused else contextlib.nullcontext():
        Endpoint(SimpleNamespace(model_config=model))


def test_an_address_that_is_not_this_machines_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.host: given '192\.0\.2\.1'; engines cannot listen there"):
        free_port("192.0.2.1")
