"""Command lines of engines on GPUs, read by the engines' own parsers: no GPU is needed to know that an option exists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig, TransferConfig
from megatron_hpt.engines.interface import Start
from megatron_hpt.engines.registry import ENGINES, interpreter
from megatron_hpt.examples import tiny_llama
from tests.engine_servers import skip_without

READ = {
    "vllm": """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor.abstract import SLEEP_TAGS
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[4:])
print(json.dumps({"share": found.gpu_memory_utilization, "sleep": found.enable_sleep_mode, "tags": sorted(SLEEP_TAGS)}))
""",
    "sglang": """
import argparse, json, sys, types
from sglang.srt.arg_groups import choices, overrides
from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
found = parser.parse_args(sys.argv[4:])
view = types.SimpleNamespace(enable_deterministic_inference=True, attention_backend=found.attention_backend)
backend = overrides._deterministic_attention_backend(view)["attention_backend"]
print(json.dumps({
    "share": found.mem_fraction_static, "sleep": found.enable_memory_saver, "tags": sorted(GPU_MEMORY_ALL_TYPES),
    "device": found.device, "cached": backend in choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
}))
""",
}


def config(engine: str, model: Path) -> Config:
    return Config(
        name="x",
        model=ModelConfig(path=str(model)),
        data=DataConfig(train="t"),
        rollout=RolloutConfig(engine=engine, sleep=True, gpu_memory_share=0.7),
        transfer=TransferConfig(transport="cuda_ipc"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_own_parser_takes_what_it_gets_on_gpus(tmp_path: Path, engine: str) -> None:
    skip_without(engine)
    tiny_llama.write(tmp_path / "model", hidden=64, layers=2, heads=2, kv_heads=2, positions=64)
    wanted = config(engine, tmp_path / "model")
    command = ENGINES[engine].command(wanted, interpreter(wanted), Start(wanted.engine_model, 1, tmp_path, on_gpus=True))
    done = subprocess.run(
        [command[0], "-c", READ[engine], *command],
        env=ENGINES[engine].environment(wanted, False),  # this machine may have none
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sleep"] is True
    assert found["share"] == pytest.approx(0.7 if engine == "vllm" else 0.63)
    assert {"weights", "kv_cache"} <= set(found["tags"])
    assert found.get("device", "cuda") == "cuda"
    assert found.get("cached", True)


def test_host_arguments_stay_on_hosts(tiny_model: Path, tmp_path: Path) -> None:
    wanted = config("sglang", tiny_model)
    on_gpus, on_host = (
        ENGINES["sglang"].command(wanted, sys.executable, Start(wanted.engine_model, 1, tmp_path, on_gpus=gpus))
        for gpus in (True, False)
    )
    for words in (("--device", "cpu"), ("--attention-backend", "torch_native"), ("--max-total-tokens",)):
        assert words[0] == "--device" or words[0] not in on_gpus
        assert set(words) <= set(on_host)
    environment = ENGINES["sglang"].environment
    assert "SGLANG_PLATFORM" in environment(wanted, False)
    assert "SGLANG_PLATFORM" not in environment(wanted, True)
    assert "VLLM_CPU_KVCACHE_SPACE" not in ENGINES["vllm"].environment(wanted, True)
