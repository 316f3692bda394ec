"""Weights from real Megatron ranks into real engines, beside copying memory and two usual ways.

    .venv/bin/python benchmarks/weight_transfer.py                  # everything, about ten minutes
    .venv/bin/python benchmarks/weight_transfer.py --only smollm2   # cases whose name holds the word

For each case: shared memory from the trainer's parameters to the last byte that the slowest engine rank has read and
checked, as a share of the rate at which one thread copies memory here, measured in the same process; the engine's own
loading stands apart. Beside it: gathering on one rank, writing safetensors to memory (tmpfs) and letting the engine
reload; and for SGLang its inline pickle. The fastest of five transfers each, after one to warm up.
"""

import argparse
import base64
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_hpt.examples import smollm2, tiny_llama

ROUNDS = 6


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    dtype: str
    engine: str
    actor: int
    """Tensor parallel ranks of the actor."""
    tensor: int
    """Tensor parallel ranks of the engine."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype}, actor TP{self.actor} → {self.engine} TP{self.tensor}"


CASES = [
    *(Case("smollm2", dtype, "vllm", 1, 1) for dtype in ("float32", "bfloat16")),
    *(Case("llama-8-heads", dtype, "vllm", 2, tensor) for dtype in ("float32", "bfloat16") for tensor in (1, 2)),
    Case("smollm2", "float32", "sglang", 1, 1),
]


def write_models(folder: Path) -> None:
    """SmolLM2-135M, and a Llama of its size whose heads two ranks can share."""
    smollm2.write(folder / "smollm2", smollm2.shipped_file())
    sizes = {"hidden": 576, "layers": 30, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab": 49_152, "ffn": 1536}
    tiny_llama.write(folder / "llama-8-heads", **sizes, positions=2048, tied=True)


def configuration(case: Case, folder: Path) -> Config:
    """The run that a case is."""
    return Config(
        name="benchmark",
        model=ModelConfig(path=str(folder / case.model), dtype=case.dtype),
        data=DataConfig(train="", max_prompt_length=64, max_response_length=64),
        rollout=RolloutConfig(engine=case.engine, tensor_parallel=case.tensor, max_running=8),
        parallel=ParallelConfig(tensor=case.actor),
    )


def measure(case: Case, folder: Path) -> dict:
    """Start the engine, let ranks of the actor publish to it, end it."""
    from megatron_hpt.engines.interface import Start
    from megatron_hpt.engines.registry import ENGINES, interpreter
    from megatron_hpt.engines.types import Weights

    config, kind = configuration(case, folder), ENGINES[case.engine]
    port = free_port()
    log = (folder / "log").open("wb")
    # With weights of its own: vLLM reloads only what it has loaded before.
    start = Start(config.engine_model, port, folder, on_gpus=False, weights=Weights.FOLDER)
    command = kind.command(config, interpreter(config), start)
    engine = subprocess.Popen(command, env=kind.environment(config, False), stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}", engine)
        out = folder / "out.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.actor}"]
        worker = [__file__, "--folder", str(folder), "--worker", json.dumps(asdict(case)), "--port", str(port)]
        subprocess.run([*torchrun, *worker], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=log)
        return json.loads(out.read_text())
    except BaseException:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        os.killpg(engine.pid, signal.SIGTERM)
        time.sleep(2)
        try:
            os.killpg(engine.pid, signal.SIGKILL)
        except ProcessLookupError:
            log.close()
        engine.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, engine: subprocess.Popen) -> None:
    while True:
        if engine.poll() is not None:
            raise SystemExit("the engine ended before it answered")
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


def work(case: Case, folder: Path, url: str) -> None:
    """One rank of the actor."""
    import torch.distributed as dist

    from megatron_hpt.actor import export, parallel, platform
    from megatron_hpt.actor.model import policy
    from megatron_hpt.engines import registry
    from megatron_hpt.models.hf_config import model_shape
    from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender
    from megatron_hpt.transfer.speed import memcpy_seconds

    config, where = configuration(case, folder), platform.detect(threads=1)
    ranks = parallel.initialize(config.parallel, where, 0, 300)
    shape = model_shape(config.model.path)
    chunks = policy.load(config.model.path, config, ranks, where)
    control = registry.control(config, url)
    target = Target(control, registry.layout(config))
    options = TransferOptions.of_run(config)
    sender = WeightSender(policy.views(chunks, shape, ranks), shape, [target], dist.group.WORLD, options)
    found: dict[str, list[float]] = {"stage": [], "receive": [], "load": [], "total": [], "usual": []}
    for version in range(1, ROUNDS + 1):
        dist.barrier()
        started = time.perf_counter()
        steps = sender.publish(version)
        found["total"].append(time.perf_counter() - started)
        if ranks.is_lead:
            for step in ("stage", "receive", "load"):
                found[step].append(steps[f"time/transfer_{step}_s"])
    views = policy.contributed_views(chunks, shape, ranks)
    usual = _reloaded if case.engine == "vllm" else _pickled
    for _ in range(2):
        dist.barrier()
        started = time.perf_counter()
        tensors = export._gather(views)
        if ranks.is_lead:
            usual(control, config, tensors)
        dist.barrier()
        found["usual"].append(time.perf_counter() - started)
    if ranks.is_lead:
        nbytes = sender.nbytes
        best = {step: min(seconds[1:]) for step, seconds in found.items()}
        result = {"case": case.name, "nbytes": nbytes, "memcpy": memcpy_seconds(nbytes), **best}
        (folder / "out.json").write_text(json.dumps(result))
    sender.close()
    parallel.shutdown()


def _reloaded(control, config: Config, tensors: dict) -> None:
    """safetensors on tmpfs, and vLLM's own reload of a folder."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
        body = {"method": "reload_weights", "kwargs": {"weights_path": place}}
        control._call("POST", "/collective_rpc", json=body)


def _pickled(control, config: Config, tensors: dict) -> None:
    """SGLang's own way without device handles: all tensors as one pickle in the body."""
    payload = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    control._post("/begin_weight_update", {})
    control._post("/update_weights_from_tensor", {"serialized_named_tensors": [payload], "flush_cache": True})
    control._post("/end_weight_update", {})


def row(found: dict) -> str:
    rate = found["nbytes"] / (found["stage"] + found["receive"]) / 1e9
    share = found["memcpy"] / (found["stage"] + found["receive"])
    cells = (
        found["case"],
        f"{found['nbytes'] / 1e6:.0f}",
        f"{found['nbytes'] / found['memcpy'] / 1e9:.1f}",
        f"{found['stage']:.3f}",
        f"{found['receive']:.3f}",
        f"{rate:.1f}",
        f"**{share:.2f}**",
        f"{found['load']:.2f}",
        f"{found['total']:.2f}",
        f"{found['usual']:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker")
    parser.add_argument("--port")
    arguments = parser.parse_args()
    if arguments.worker:
        work(Case(**json.loads(arguments.worker)), arguments.folder, f"http://127.0.0.1:{arguments.port}")
        return
    titles = ("case", "MB", "memcpy GB/s", "stage s", "read s", "GB/s", "of memcpy", "load s", "whole s", "usual way s")
    with tempfile.TemporaryDirectory() as place:
        write_models(Path(place))
        print("| " + " | ".join(titles) + " |")
        print("|" + "---|" * len(titles), flush=True)
        for case in CASES:
            if arguments.only in case.name:
                print(row(measure(case, Path(place))), flush=True)


if __name__ == "__main__":
    main()
