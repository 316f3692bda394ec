"""SGLang as a rollout engine: how its server is started, and the client of its native route, with token ids in and out.

Written against SGLang 0.5.23 (``/generate``, sglang/srt/entrypoints/http_server.py, srt/managers/io_struct.py). SGLang ignores
unknown keys, and some bad requests end the whole server, so requests are checked here before they are sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec

from megatron_hpt.config import Config
from megatron_hpt.engines.client import CONNECTIONS, HttpEngine, answer_of, connections_of
from megatron_hpt.engines.experts import has_plain_experts
from megatron_hpt.engines.extra_arguments import SET_BY_RUN, TENSOR_RANKS_ALONE
from megatron_hpt.engines.host import cache_room, cores_of_ranks, threads_of_ranks
from megatron_hpt.engines.interface import EngineKind, RunningServer, SamplingLimits, Start
from megatron_hpt.engines.seeding import is_seeded, server_seed
from megatron_hpt.engines.sglang import host, site
from megatron_hpt.engines.sglang.control import SglangControl
from megatron_hpt.engines.types import Sample, SamplingRequest, Span
from megatron_hpt.environment import inherited_here
from megatron_hpt.errors import EngineError
from megatron_hpt.files import write_private
from megatron_hpt.models.hf_config import run_shape
from megatron_hpt.process import token

ENVIRONMENT = ".venv-sglang"
"""Name of the environment that `make sglang-env` builds, beside that of the trainer."""
SPARE = 6
"""Tokens of its context that SGLang leaves unused: a response ends 2 tokens before the context does, and a prompt that comes
within 6 tokens of it is refused (srt/managers/tp_worker.py, scheduler.py)."""
SEEDED_ARGUMENTS = (
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--sampling-backend", "pytorch"),  # the only one of the deterministic mode
)
"""Arguments of a server that heeds seeds, beside its deterministic mode; it runs eagerly, as vLLM does then."""
STATIC_SHARE = 0.9
"""Part of its share of a GPU's memory that SGLang holds all the time, for weights and KV cache; batches use the rest."""


def server_command(config: Config, python: str, start: Start) -> list[str]:
    """Return the command line of one server. The run's token is in a private file, since anybody can read command lines."""
    command = _arguments(config, python, start)
    if own := token():
        file = start.folder / f"sglang_{start.port}.yaml"
        write_private(file, f"api-key: {own}\n")
        command += ["--config", str(file)]
    return command


def _arguments(config: Config, python: str, start: Start) -> list[str]:
    seeded = is_seeded(config, start.on_gpus)
    return [
        *(python, "-m", "sglang.launch_server"),
        *("--model-path", start.model, "--served-model-name", config.name),
        *("--host", config.rollout.host, "--port", str(start.port)),
        *("--dtype", config.model.dtype, "--tp-size", str(config.rollout.tensor_parallel)),
        *(
            "--context-length",
            str(config.max_sequence_length + SPARE),
            "--max-running-requests",
            str(config.rollout.max_running),
        ),
        # A trainer's weights come before the first request, so none are read here.
        *("--load-format", start.weights.value, "--skip-server-warmup", "--skip-tokenizer-init"),
        "--sleep-on-idle",  # else an idle server keeps a core of the trainer's busy
        # Seeds of requests are heeded in this mode only.
        *(["--enable-deterministic-inference"] if seeded else []),
        *("--random-seed", str(server_seed(config, start)), "--grammar-backend", "none", "--log-level", "warning"),
        *(SEEDED_ARGUMENTS if seeded else ()),
        *(_gpu_arguments(config, start) if start.on_gpus else _host_arguments(cache_tokens(config))),
        *config.rollout.extra_arguments,
    ]


def _gpu_arguments(config: Config, start: Start) -> list[str]:
    """Return the options of a server on GPUs.

    SGLang's share is of the memory that is free before it loads, and counts only what it holds all the time (srt/mem_cache/
    kv_cache_configurator.py, _profile_available_bytes): on a GPU that others use too it takes less than its share.

    SGLang chooses the attention backend; with `rollout.seeded` one that can be deterministic on that GPU (srt/arg_groups/
    overrides.py, _deterministic_attention_backend): fa3 up to Hopper, flashinfer on Blackwell, there without its prefix cache.
    """
    static = STATIC_SHARE * config.rollout.gpu_memory_share
    sleep = ["--enable-memory-saver"] if config.rollout.sleep else []
    experts = ["--moe-runner-backend", "triton"] if has_plain_experts(start.model) else []
    return ["--device", "cuda", "--mem-fraction-static", f"{static:.3g}", *sleep, *experts]


def _host_arguments(cache_tokens: int) -> list[str]:
    """Return the options of a server without a GPU: plain torch operations, and a KV cache of a given size."""
    return [
        *("--device", "cpu", "--attention-backend", "torch_native"),
        *("--disable-overlap-schedule", "--max-total-tokens", str(cache_tokens)),
    ]


def cache_tokens(config: Config) -> int:
    """Return the tokens in the KV cache of a server on the host: what has room, and not more than can be in use."""
    most = config.rollout.max_running * (config.max_sequence_length + SPARE)
    return min(cache_room(config, run_shape(config)), most)


def server_environment(config: Config, on_gpus: bool) -> dict[str, str]:
    """Return the whole environment of a server."""
    # The context may go beyond the model's positions by what no sequence uses.
    own = {"SGLANG_PLUGINS": "megatron_hpt", "HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return {**inherited_here(), **own, **({} if on_gpus else _host_environment(config))}


def _host_environment(config: Config) -> dict[str, str]:
    site_folder = str(Path(site.__file__).parent)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, (site_folder, os.environ.get("PYTHONPATH")))),
        "SGLANG_PLATFORM": host.NAME,
        "SGLANG_PLUGINS": f"megatron_hpt,{host.NAME}",
        **threads_of_ranks(config),
        # SGLang wants cores for each rank, or else a NUMA node; its kernel package alone would bind threads to them
        # (srt/distributed/bootstrap.py).
        "SGLANG_CPU_OMP_THREADS_BIND": cores_of_ranks(config),
        "TORCHDYNAMO_DISABLE": "1",  # its sampler would be compiled under the first request, for more than a minute
    }


class _Logprob(msgspec.Struct, array_like=True, gc=False):
    """The first of three: log-probability, token id, text."""

    logprob: float


class _FinishReason(msgspec.Struct, gc=False):
    type: str


class _MetaInfo(msgspec.Struct, gc=False):
    output_token_logprobs: list[_Logprob]
    finish_reason: _FinishReason
    weight_versions: list[Span] | None


class _Answer(msgspec.Struct, gc=False):
    """What is read of the answer to one request of a batch (sglang/srt/managers/tokenizer_manager.py)."""

    output_ids: list[int]
    meta_info: _MetaInfo


class SglangEngine(HttpEngine):
    """The client of one SGLang server."""

    answer_type = list[_Answer]
    generate_route = "/generate"
    version_route = "/model_info"
    progress_route = "/v1/loads?include=core"

    def __init__(
        self, url: str, deadline_s: float, silent_s: float, vocab: int, connections: int = CONNECTIONS, own: str | None = None
    ) -> None:
        super().__init__(url, deadline_s, silent_s, connections, own)
        self._vocab = vocab

    def progress_of(self, answer: bytes) -> Hashable:
        """Return requests and tokens in the cache, which grow with every token produced (srt/managers/load_snapshot.py)."""
        return tuple((load["num_running_reqs"], load["num_used_tokens"]) for load in json.loads(answer)["loads"])

    def body(self, request: SamplingRequest) -> dict[str, Any]:
        """Return a batch of single samples, because the samples of one request would share its seed.

        Each has a seed, whether or not the server heeds seeds: one in deterministic mode, as a user may have started, gives all
        samples without a seed the same one, and any other ignores them at no cost (srt/sampling/sampling_batch_info.py).

        Raises:
            EngineError: a token is outside the vocabulary, which would end the server.
        """
        if outside := [token for token in request.tokens if not 0 <= token < self._vocab]:
            raise EngineError(f"token {outside[0]} is outside the model's vocabulary of {self._vocab}: the server would end")
        parameters = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "max_new_tokens": request.max_tokens,
            "stop_token_ids": [request.stop_token],
        }
        seeds = range(request.seed, request.seed + request.samples)
        return {
            "input_ids": [request.tokens] * request.samples,
            "sampling_params": [{**parameters, "sampling_seed": seed} for seed in seeds],
            "return_logprob": True,
            **request.cache_salt,
        }

    def samples(self, answer: list[_Answer]) -> list[Sample]:
        return [
            self.whole_sample(
                sample.output_ids,
                [token.logprob for token in sample.meta_info.output_token_logprobs],
                sample.meta_info.finish_reason.type,
                sample.meta_info.weight_versions,
            )
            for sample in answer
        ]


def client(config: Config, url: str, own: str | None = None) -> SglangEngine:
    """Return the client of a server of a run."""
    vocab, deadlines = run_shape(config).vocab, config.deadlines
    return SglangEngine(url, deadlines.rollout_s, deadlines.silent_s, vocab, connections_of(config), own)


def recognise(url: str, http: httpx.Client) -> RunningServer | None:
    """Describe an SGLang server that somebody else has started."""
    info = answer_of(http, "/model_info")
    if info is None:
        return None
    length = (answer_of(http, "/server_info") or {}).get("context_length")
    model, label = info["model_path"], str(info["weight_version"])
    return RunningServer(
        url,
        SGLANG.name,
        info.get("served_model_name") or model,
        model,
        label,
        length and length - SPARE,
        client=partial(_client_of_running, url, label),
    )


def _client_of_running(url: str, label: str, vocab: int, deadline_s: float, silent_s: float) -> SglangEngine:
    return SglangEngine(url, deadline_s, silent_s, vocab, own=label)


SGLANG = EngineKind(
    name="sglang",
    title="SGLang",
    packages=("sglang",),
    plugin_group="sglang.srt.plugins",
    install="make sglang-env",
    python=lambda: str(Path(sys.prefix).parent / ENVIRONMENT / "bin" / "python"),
    command=server_command,
    environment=server_environment,
    argument_check="""
import argparse, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
ServerArgs.from_cli_args(parser.parse_args(sys.argv[4:]))
""",
    client=client,
    control=SglangControl,
    recognise=recognise,
    # srt/sampling/sampling_params.py (_SAMPLING_EPS).
    limits=SamplingLimits(coldest=1e-6),
    workspace_bytes=lambda share: (1 - STATIC_SHARE) * share,
    reserved_arguments={
        "--tensor-parallel-size": "rollout.tensor_parallel sets it",
        "--quantization": "SGLang replaces weights that it has quantised by others without a loader (quantization/fp8.py)",
        **dict.fromkeys(("--config", "--api-key"), SET_BY_RUN),
        **dict.fromkeys(("--pp-size", "--pipeline-parallel-size", "--dp-size", "--data-parallel-size"), TENSOR_RANKS_ALONE),
        **dict.fromkeys(("--ep-size", "--expert-parallel-size"), TENSOR_RANKS_ALONE),
    },
    loads_fp8_per_tensor=False,
)
