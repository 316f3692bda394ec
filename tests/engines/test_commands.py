"""Command lines of engines on GPUs, read by the engines' own parsers: no GPU is needed to know that an option exists."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig, TransferConfig
from megatron_hpt.engines import extra_arguments
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import ENGINES, interpreter
from megatron_hpt.errors import ConfigError
from megatron_hpt.examples import tiny_families, tiny_llama
from tests.engine_servers import skip_without

READ = {
    "vllm": """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor.abstract import SLEEP_TAGS
parser = make_arg_parser(FlexibleArgumentParser())
read = []
for line in json.loads(sys.argv[1]):
    found = parser.parse_args(line[3:])
    arguments = AsyncEngineArgs.from_cli_args(found)
    read.append({
        "share": arguments.gpu_memory_utilization, "sleep": arguments.enable_sleep_mode, "eager": arguments.enforce_eager,
        "chunked": arguments.enable_chunked_prefill, "tokens": arguments.max_num_batched_tokens, "seed": arguments.seed,
        "experts": arguments.moe_backend, "cache": arguments.kv_cache_dtype, "logprobs": arguments.logprobs_mode,
        "speculation": (arguments.speculative_config or {}).get("method"),
    })
names = [action.option_strings for action in parser._actions]
print(json.dumps({"read": read, "names": names, "tags": sorted(SLEEP_TAGS)}))
""",
    "sglang": """
import argparse, json, sys, types
from sglang.srt.arg_groups import choices, overrides
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
read = []
for line in json.loads(sys.argv[1]):
    found = parser.parse_args(line[3:])
    arguments = ServerArgs.from_cli_args(found)
    view = types.SimpleNamespace(enable_deterministic_inference=True, attention_backend=found.attention_backend)
    backend = overrides._deterministic_attention_backend(view)["attention_backend"]
    read.append({
        "share": arguments.mem_fraction_static, "sleep": arguments.enable_memory_saver, "device": arguments.device,
        "deterministic": arguments.enable_deterministic_inference, "sampling": found.sampling_backend,
        "seed": arguments.random_seed, "experts": arguments.moe_runner_backend, "cache": arguments.kv_cache_dtype,
        "graphs": [found.cuda_graph_backend_decode, found.cuda_graph_backend_prefill],
        "cached": backend in choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
        "speculation": found.speculative_algorithm,
    })
names = [action.option_strings for action in parser._actions]
print(json.dumps({"read": read, "names": names, "tags": sorted(GPU_MEMORY_ALL_TYPES)}))
""",
}
EXTRA = {
    "vllm": ["--kv-cache-dtype=fp8", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
    "sglang": ["--kv-cache-dtype", "fp8_e4m3", "--speculative-algorithm", "NGRAM"],
}


def config(engine: str, model: Path, **rollout: Any) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="t"),
        rollout=RolloutConfig(**{"engine": engine, "sleep": True, "gpu_memory_share": 0.7, **rollout}),
        transfer=TransferConfig(transport="cuda_ipc"),
    )


def command(wanted: Config, folder: Path, port: int = 1, on_gpus: bool = True) -> list[str]:
    return ENGINES[wanted.rollout.engine].command(wanted, sys.executable, Start(wanted.engine_model, port, folder, on_gpus))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama.write(folder / "dense", hidden=64, layers=2, heads=2, kv_heads=2, positions=64)
    tiny_families.write(folder / "experts", "qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    tiny_families.write(folder / "quantised", "qwen3_moe", num_hidden_layers=2, num_experts=4, num_experts_per_tok=2)
    file = folder / "quantised" / "config.json"
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantised}))
    return {name: folder / name for name in ("dense", "experts", "quantised")}


def read(wanted: Config, lines: list[list[str]]) -> dict[str, Any]:
    """What the installed engine's parser makes of command lines, all in one process."""
    done = subprocess.run(
        ["nice", "-n", "19", interpreter(wanted), "-c", READ[wanted.rollout.engine], json.dumps(lines)],
        env=ENGINES[wanted.rollout.engine].environment(wanted, False),  # this machine may have none
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_own_parser_takes_what_it_gets_on_gpus(tmp_path: Path, models: dict[str, Path], engine: str) -> None:
    skip_without(engine)
    wanted = {
        "seeded": config(engine, models["dense"], seeded=True),
        "fast": config(engine, models["dense"], sleep=False),
        "many": config(engine, models["dense"], max_running=10_000),
        "experts": config(engine, models["experts"]),
        "extra": config(engine, models["dense"], extra_arguments=EXTRA[engine]),
    }
    lines = {name: command(one, tmp_path) for name, one in wanted.items()}
    found = read(wanted["fast"], list(lines.values()))
    assert {"weights", "kv_cache"} <= set(found["tags"])
    told = dict(zip(wanted, found["read"], strict=True))
    assert [told[name]["sleep"] for name in wanted] == [True, False, True, True, True]
    assert all(one["share"] == pytest.approx(0.7 if engine == "vllm" else 0.63) for one in told.values())
    assert [told[name]["experts"] for name in wanted] == ["auto", "auto", "auto", "triton", "auto"]
    assert told["seeded"]["seed"] == 0
    assert told["extra"]["cache"].startswith("fp8")
    assert told["extra"]["speculation"].lower() == "ngram"
    if engine == "vllm":
        assert [(told[name]["eager"], told[name]["chunked"], told[name]["tokens"]) for name in wanted] == [
            (True, False, 4096),
            (False, None, None),
            (False, None, 10_000),
            (False, None, None),
            (False, None, None),
        ]
        assert {one["logprobs"] for one in told.values()} == {"processed_logprobs"}
    else:
        assert {one["device"] for one in told.values()} == {"cuda"}
        assert told["seeded"]["deterministic"]
        assert told["seeded"]["cached"]
        assert (told["seeded"]["sampling"], told["seeded"]["graphs"]) == ("pytorch", ["disabled", "disabled"])
        assert (told["fast"]["deterministic"], told["fast"]["sampling"]) == (False, None)
        assert "disabled" not in told["fast"]["graphs"]
    assert_no_name_of_our_options_can_be_given(engine, lines, found["names"])


def assert_no_name_of_our_options_can_be_given(engine: str, lines: dict[str, list[str]], names: list[list[str]]) -> None:
    """Under no name that the parser has for it, and no beginning of one that it would take for the whole."""
    every = [name for known in names for name in known]
    for line in lines.values():
        own = [word for word in line[3:] if word.startswith("--") and word.split("=")[0] in every and word not in EXTRA[engine]]
        for known in names:
            if not set(known) & set(own):
                continue
            long = [name for name in known if name.startswith("--")]
            short = [name[:-1] for name in long if [other for other in every if other.startswith(name[:-1])] == [name]]
            for name in [*known, *short, *(f"{each}=1" for each in long)]:
                with pytest.raises(ConfigError, match=r"rollout\.extra_arguments: -"):
                    extra_arguments.check([name], line, ENGINES[engine].reserved_arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_servers_that_choose_their_own_noise_begin_with_different_seeds(tmp_path: Path, tiny_model: Path, engine: str) -> None:
    def seed(port: int, seeded: bool | None, on_gpus: bool) -> str:
        line = command(config(engine, tiny_model, seeded=seeded), tmp_path, port, on_gpus)
        return line[line.index({"vllm": "--seed", "sglang": "--random-seed"}[engine]) + 1]

    assert len({seed(port, None, True) for port in range(1, 9)}) == 8
    assert seed(5, None, True) == seed(5, False, True)  # it is started again
    assert {seed(port, True, True) for port in range(1, 9)} == {seed(1, None, False)} == {"0"}


@pytest.mark.parametrize("engine", ENGINES)
def test_only_experts_that_are_compared_keep_their_places(tmp_path: Path, models: dict[str, Path], engine: str) -> None:
    option = {"vllm": "--moe-backend", "sglang": "--moe-runner-backend"}[engine]
    chosen = {name for name, folder in models.items() if option in command(config(engine, folder), tmp_path)}
    assert chosen == {"experts"}
    assert option not in command(config(engine, models["experts"]), tmp_path, on_gpus=False)
    assert option not in command(config(engine, tmp_path / "on another machine"), tmp_path)


def test_what_a_host_starts_is_as_it_was(tmp_path: Path, tiny_model: Path) -> None:
    """Seeds are its default, and change nothing."""
    for engine in ENGINES:
        lines = [command(config(engine, tiny_model, seeded=seeded), tmp_path, on_gpus=False) for seeded in (None, True)]
        assert lines[0] == lines[1]
    line = command(config("vllm", tiny_model), tmp_path, on_gpus=False)
    assert " ".join(line[line.index("--max-num-seqs") : line.index("--load-format")]) == (
        "--max-num-seqs 256 --no-enable-chunked-prefill --max-num-batched-tokens 4096"
    )
    assert " ".join(line[line.index("--enable-scale-out") :]) == (
        "--enable-scale-out --enforce-eager --disable-uvicorn-access-log --seed 0 --distributed-executor-backend "
        "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    )
    line = command(config("sglang", tiny_model), tmp_path, on_gpus=False)
    assert " ".join(line[line.index("--sleep-on-idle") : line.index("--max-total-tokens")]) == (
        "--sleep-on-idle --enable-deterministic-inference --random-seed 0 --grammar-backend none --log-level warning "
        "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled --sampling-backend pytorch "
        "--device cpu --attention-backend torch_native --disable-overlap-schedule"
    )


def test_host_arguments_stay_on_hosts(tiny_model: Path, tmp_path: Path) -> None:
    wanted = config("sglang", tiny_model)
    on_gpus, on_host = (command(wanted, tmp_path, on_gpus=gpus) for gpus in (True, False))
    for words in (("--device", "cpu"), ("--attention-backend", "torch_native"), ("--max-total-tokens",)):
        assert words[0] == "--device" or words[0] not in on_gpus
        assert set(words) <= set(on_host)
    environment = ENGINES["sglang"].environment
    assert "SGLANG_PLATFORM" in environment(wanted, False)
    assert "SGLANG_PLATFORM" not in environment(wanted, True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in ENGINES["vllm"].environment(wanted, True)
