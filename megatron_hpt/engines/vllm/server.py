"""vLLM as a rollout engine: how its server is started, and the client of its token-in, token-out route.

Written against vLLM 0.32 (``/inference/v1/generate``, vllm/entrypoints/scale_out/token_in_token_out).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Hashable
from functools import partial
from http import HTTPStatus
from typing import Any

import httpx
import msgspec

from megatron_hpt.config import Config
from megatron_hpt.engines.client import CONNECTIONS, HttpEngine, answer_of, connections_of
from megatron_hpt.engines.experts import has_plain_experts
from megatron_hpt.engines.extra_arguments import SET_BY_RUN, TENSOR_RANKS_ALONE
from megatron_hpt.engines.host import threads_of_ranks
from megatron_hpt.engines.interface import EngineKind, RunningServer, SamplingLimits, Start
from megatron_hpt.engines.seeding import is_seeded, server_seed
from megatron_hpt.engines.types import Sample, SamplingRequest
from megatron_hpt.engines.vllm.answers import PACKED, Answer, PackedAnswer
from megatron_hpt.engines.vllm.completions import UNLABELLED, CompletionsEngine
from megatron_hpt.engines.vllm.control import VllmControl
from megatron_hpt.environment import inherited_here

ONE_PROCESS = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
"""Names the executor's class, because vLLM replaces the word ``uni`` on a host (platforms/cpu.py)."""
WORKSPACE_BYTES = 3 * 2**30
"""Bytes of a GPU that vLLM takes for activations and buffers."""
SMALLEST_BATCH, LARGE_BATCH = 2048, 8192
"""Tokens of a forward pass that vLLM chooses for a server's GPU: at least, and for an H100 (engine/arg_utils.py,
get_batch_defaults)."""


def server_command(config: Config, python: str, start: Start) -> list[str]:
    """Return the command line of one server."""
    seeded = is_seeded(config, start.on_gpus)
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", start.model, "--served-model-name", config.name),
        *("--host", config.rollout.host, "--port", str(start.port)),
        *("--middleware", "megatron_hpt.engines.vllm.answers.PackAnswers"),
        *("--middleware", "megatron_hpt.engines.vllm.run_token.RequireRunToken"),  # the last one is asked first
        *("--dtype", config.model.dtype, "--tensor-parallel-size", str(config.rollout.tensor_parallel)),
        *("--max-model-len", str(config.max_sequence_length), "--max-num-seqs", str(config.rollout.max_running)),
        *_prefill_arguments(config, seeded),
        # A trainer's weights come before the first request, so none are read here.
        *("--load-format", start.weights.value, "--weight-transfer-config", json.dumps({"backend": "megatron_hpt"})),
        *("--worker-extension-cls", "megatron_hpt.engines.vllm.plugin.Outcomes"),
        # The log-probabilities of the distribution that was sampled from, temperature and nucleus applied. Rollouts lose no
        # fast sampler by them: FlashInfer's, which has none, is for nuclei alone (v1/worker/gpu/sample/sampler.py).
        *("--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm", "--skip-tokenizer-init", "--enable-scale-out"),
        *(["--enforce-eager"] if seeded else []),
        *("--disable-uvicorn-access-log", "--seed", str(server_seed(config, start))),
        *(_gpu_arguments(config, start) if start.on_gpus else _host_arguments(config)),
        *config.rollout.extra_arguments,
    ]


def _prefill_arguments(config: Config, seeded: bool) -> list[str]:
    """Return how many tokens a forward pass may have, in which vLLM wants room for one token of each sequence that it decodes,
    and for a whole sequence where prompts are not cut (config/scheduler.py).

    vLLM 0.32 rewinds a seeded request's generator when it cuts a prompt in two, which the CPU generator cannot do. Unseeded
    servers cut prompts, and have vLLM's own number for their GPU unless that is too small.
    """
    running = config.rollout.max_running
    if seeded:
        tokens = max(4096, config.max_sequence_length, running)
        return ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(tokens)]
    return ["--max-num-batched-tokens", str(max(LARGE_BATCH, running))] if running > SMALLEST_BATCH else []


def _gpu_arguments(config: Config, start: Start) -> list[str]:
    # The share is of the GPU's whole memory; vLLM wants that much free when it starts (v1/worker/utils.py, request_memory).
    sleep = ["--enable-sleep-mode"] if config.rollout.sleep else []
    experts = ["--moe-backend", "triton"] if has_plain_experts(start.model) else []
    return ["--gpu-memory-utilization", f"{config.rollout.gpu_memory_share:g}", *sleep, *experts]


def _host_arguments(config: Config) -> list[str]:
    # One rank computes in the engine's process: vLLM would start another one for it, which takes as long as the others.
    return list(ONE_PROCESS) if config.rollout.tensor_parallel == 1 else []


def server_environment(config: Config, on_gpus: bool) -> dict[str, str]:
    """Return the whole environment of a server."""
    return {
        **inherited_here(),
        **({} if on_gpus else _host_environment(config)),
        "VLLM_SERVER_DEV_MODE": "1",  # exposes the weight-update routes; RequireRunToken stands before all of them
        "VLLM_PLUGINS": "megatron_hpt",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _host_environment(config: Config) -> dict[str, str]:
    return {
        **threads_of_ranks(config),
        # Left to itself vLLM keeps a core for its scheduler, wants a NUMA node for each rank, and binds threads to cores that
        # may be another program's (utils/ompmultiprocessing.py).
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",  # the first request would wait half a minute for a sampler that is no faster
        "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.kv_cache_gib),
    }


class VllmEngine(HttpEngine):
    """The client of a vLLM server that was started as `server_command` says."""

    answer_type = Answer
    accept = f"{PACKED}, application/json"
    generate_route = "/inference/v1/generate"
    version_route = "/weight_info"
    progress_route = "/metrics"

    def __init__(
        self,
        url: str,
        deadline_s: float,
        silent_s: float,
        connections: int = CONNECTIONS,
        own: str | None = None,
        seeded: bool = True,
    ) -> None:
        """
        Args:
            seeded: whether requests carry their seed, for which vLLM makes a random generator each on its first model runner
                (v1/worker/gpu_model_runner.py).
        """
        super().__init__(url, deadline_s, silent_s, connections, own)
        self._seeded = seeded
        self._unpack = msgspec.msgpack.Decoder(PackedAnswer)

    def progress_of(self, answer: bytes) -> Hashable:
        """Return the tokens produced since the start (vllm/v1/metrics/loggers.py), or None if statistics are switched off."""
        lines = answer.decode(errors="replace").splitlines()
        return tuple(line.rpartition(" ")[2] for line in lines if line.startswith("vllm:generation_tokens_total")) or None

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        return {
            "token_ids": request.tokens,
            "sampling_params": {
                "n": request.samples,
                **({"seed": request.seed} if self._seeded else {}),
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "stop_token_ids": [request.stop_token],
                "logprobs": 0,
                "detokenize": False,
            },
            **request.cache_salt,
        }

    def read(self, content: bytes, kind: str) -> list[Sample]:
        return self.samples(self._unpack.decode(content)) if kind == PACKED else super().read(content, kind)

    def samples(self, answer: Answer | PackedAnswer) -> list[Sample]:
        return [self.whole_sample(*choice.arrays(), choice.finish_reason, choice.weight_versions) for choice in answer.choices]


def client(config: Config, url: str, own: str | None = None) -> VllmEngine:
    """Return the client of a server of a run."""
    deadlines = config.deadlines
    return VllmEngine(url, deadlines.rollout_s, deadlines.silent_s, connections_of(config), own, is_seeded(config))


def recognise(url: str, http: httpx.Client) -> RunningServer | None:
    """Describe a vLLM server that somebody else has started.

    One that was started as a run's (with the token-in, token-out route and labelled weights) is asked by that route, any other
    by OpenAI's completions.
    """
    models = answer_of(http, "/v1/models")
    if models is None:
        return None
    model = models["data"][0]
    weights = answer_of(http, CompletionsEngine.version_route)
    label = UNLABELLED if weights is None else str(weights["weight_version"])
    of_a_run = weights is not None and http.get(VllmEngine.generate_route).status_code == HTTPStatus.METHOD_NOT_ALLOWED
    make = partial(_client_of_a_run, url, label) if of_a_run else partial(_client_of_any, url, model["id"], label)
    return RunningServer(
        url, VLLM.name, model["id"], model.get("root") or model["id"], label, model.get("max_model_len"), client=make
    )


def _client_of_a_run(url: str, label: str, vocab: int, deadline_s: float, silent_s: float) -> VllmEngine:
    return VllmEngine(url, deadline_s, silent_s, own=label)


def _client_of_any(url: str, served: str, label: str, vocab: int, deadline_s: float, silent_s: float) -> CompletionsEngine:
    return CompletionsEngine(url, deadline_s, silent_s, served, label)


VLLM = EngineKind(
    name="vllm",
    title="vLLM",
    packages=("vllm", "vllm-cpu"),
    plugin_group="vllm.general_plugins",
    install="make .venv/.ready",
    python=lambda: sys.executable,
    command=server_command,
    environment=server_environment,
    argument_check="""
import sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[4:])).create_engine_config()
""",
    client=client,
    control=VllmControl,
    recognise=recognise,
    # sampling_params.py (_MAX_TEMP, _verify_args), entrypoints/scale_out/token_in_token_out/serving.py.
    limits=SamplingLimits(coldest=0.01, hottest=2.0, samples_are_one_request=True),
    workspace_bytes=lambda share: WORKSPACE_BYTES,
    reserved_arguments={
        "-tp": "rollout.tensor_parallel sets it",
        "--device-memory-utilization": "rollout.gpu_memory_share sets it",
        **dict.fromkeys(("--config", "--api-key"), SET_BY_RUN),
        **dict.fromkeys(("-pp", "--pipeline-parallel-size", "-dp", "--data-parallel-size"), TENSOR_RANKS_ALONE),
        **dict.fromkeys(("-ep", "--enable-expert-parallel"), TENSOR_RANKS_ALONE),
    },
    host_head_dims=(32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512),  # v1/attention/backends/cpu_attn.py
)
