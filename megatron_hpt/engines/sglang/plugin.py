"""Our receiver of weights inside SGLang: hooks of SGLang's own plugin interface (entry point ``sglang.srt.plugins``).

An `update_weights_from_tensor` with our load format carries a command as JSON bytes and no weights; those come by the
transfer's transport. An error is an answer (400), while SGLang's own formats end the server.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_hpt.engines.sglang import host
from megatron_hpt.errors import HptError, TransferError
from megatron_hpt.models.hf_config import read_config, shape_of_any
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest
from megatron_hpt.transfer.quantize import PER_TENSOR
from megatron_hpt.transfer.readback import EngineWeights, addresses, check_unmoved, plain_parameter
from megatron_hpt.transfer.receiver import Receiver, Seat, compare_only, wait_for
from megatron_hpt.transfer.wire_format import fp8_format

logger = logging.getLogger(__name__)
LOAD_FORMAT = "megatron_hpt"
_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"
_MESSAGE_BYTES = 1024


class Endpoint:
    """The receiver of one rank's model runner; its methods are the actions of a command."""

    def __init__(self, updater: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        parallel, config = get_parallel(), updater.model_config
        if parallel.pp_size > 1:
            raise TransferError("SGLang servers with pipeline stages cannot be given weights: their outcomes are not gathered")
        layout = EngineLayout(parallel.tp_size, parallel.pp_size, parallel.moe_ep_size)
        rank = parallel.tp_rank + parallel.tp_size * parallel.pp_rank
        folder, dtype = config.model_path, str(config.dtype).removeprefix("torch.")
        fp8 = fp8_format(read_config(folder))
        if fp8 == PER_TENSOR or (config.quantization and fp8 is None):
            raise TransferError(
                "SGLang replaces FP8 weights with a scale for each tensor, and those that it has quantised itself, by weights "
                "without a loader: start it from an FP8 checkpoint with weight_block_size [128, 128], or unquantised"
            )
        self._seat = Seat(shape_of_any(folder), layout, rank, dtype, fp8)
        self._receiver = Receiver(self._seat)
        self._updater = updater

    def agree(self, contents: dict[str, Any]) -> dict[str, float]:
        """Agree with a trainer on what will travel."""
        self._receiver.agree(Contents.from_json(contents))
        return {}

    def update(self, manifest: dict[str, Any]) -> dict[str, float]:
        """Check a version, load it, and compare it if the manifest asks for it; return the seconds of each step."""
        wanted = Manifest.from_json(manifest)
        self._receiver.take(wanted)
        model = self._updater.get_model()
        before = addresses(model)
        self._receiver.load(model.load_weights)
        wait_for(next(model.parameters()).device)
        check_unmoved(before, model)
        if wanted.compare and self._seat.fp8 is None:  # FP8 engines transpose and requantise what they load
            self._receiver.compare(self._weights().read)
        return self._receiver.seconds

    def compare(self, sent: dict[str, Any]) -> dict[str, float]:
        """Compare the model's weights with those that a `Contents` and a `Manifest` (as JSON) describe."""
        contents, manifest = Contents.from_json(sent["contents"]), Manifest.from_json(sent["manifest"])
        compare_only(self._seat, contents, manifest, self._weights().read)
        return {}

    def _weights(self) -> EngineWeights:
        model, tied = self._updater.get_model(), self._seat.shape.tied_embeddings
        return EngineWeights(model, self._receiver.names, plain_parameter, tied=tied)


_endpoints: dict[int, Endpoint] = {}


def receive(original: Callable[..., tuple[bool, str]], updater: Any, named_tensors: Any, load_format: str | None = None):
    """Carry out a command of ours, and leave other load formats to SGLang: a hook around
    `WeightUpdater.update_weights_from_tensor`."""
    if load_format != LOAD_FORMAT:
        return original(updater, named_tensors, load_format)
    failure, seconds = "", {}
    try:
        command = json.loads(bytes(dict(named_tensors)["command"].numpy()))
        if id(updater) not in _endpoints:
            _endpoints[id(updater)] = Endpoint(updater)
        endpoint = _endpoints[id(updater)]
        actions = {"agree": endpoint.agree, "update": endpoint.update, "compare": endpoint.compare}
        seconds = actions[command["action"]](command["body"])
    except HptError as error:
        failure = str(error)
    except Exception as error:  # SGLang's scheduler would end the whole server
        logger.exception("weight transfer")
        failure = f"{type(error).__name__}: {error}"
    failed = _of_all_ranks(failure)
    return not failed, failed or json.dumps(seconds)


def _of_all_ranks(message: str) -> str:
    """Return the first failure of any rank on every rank, or "": SGLang answers with the outcome of the first rank alone."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group.cpu_group
    text = message.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    failures = [bytes(m.numpy()).rstrip(b"\0").decode(errors="replace") for m in everyone]
    return next((f"rank {rank}: {text}" for rank, text in enumerate(failures) if text), "")


def register() -> None:
    """Register our hooks. Entry point, called by SGLang in each of its processes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_UPDATER, receive, HookType.AROUND)
    if os.environ.get("SGLANG_PLATFORM") == host.NAME:
        for target, replacement in host.hooks().items():
            HookRegistry.register(target, replacement, HookType.REPLACE)
