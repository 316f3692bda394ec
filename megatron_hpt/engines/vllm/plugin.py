"""Our receiver of weights inside vLLM: a backend of vLLM's own weight-transfer factory.

vLLM imports this in each of its processes through the entry point ``vllm.general_plugins``; a server that is started
with ``--weight-transfer-config '{"backend": "megatron_hpt"}'`` then uses it. This is the only module that imports vLLM.

Nothing here raises out of a call: in vLLM 0.32 an error on one of several ranks leaves the other ranks' replies in their
queues, and every later call gets the reply of the one before (v1/executor/multiproc_executor.py, get_response). Instead each
rank keeps its outcome, and `VllmControl` asks for it by `Outcomes` after every call.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_hpt.errors import TransferError
from megatron_hpt.models.hf_config import read_config, shape_of_any
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest
from megatron_hpt.transfer.readback import EngineWeights, addresses, check_unmoved, plain_parameter
from megatron_hpt.transfer.receiver import Receiver, Seat, compare_only, wait_for
from megatron_hpt.transfer.wire_format import fp8_format

BACKEND = "megatron_hpt"
logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: the JSON of `Contents`."""

    contents: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: the JSON of a `Manifest`."""

    manifest: dict[str, Any] = field(default_factory=dict)


def _kept(method: Callable[..., None]) -> Callable[..., None]:
    """Keep the error of a call for `Outcomes` instead of raising it; the module's docstring says why."""

    @functools.wraps(method)
    def call(self: ManifestWeightTransferEngine, *args: Any) -> None:
        try:
            method(self, *args)
            self.failure = ""
        except Exception as error:
            logger.exception("weight transfer: %s", method.__name__)
            self.failure = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"

    return call


class Outcomes:
    """Methods that vLLM adds to every worker (``--worker-extension-cls``); called by ``/collective_rpc``."""

    def transfer_outcome(self) -> dict[str, Any]:
        """Return this rank's state: ``failure`` (error of its last step, or ""), ``open`` (whether an update has been started)
        and ``seconds`` (durations of the last update's steps)."""
        engine = self.weight_transfer_engine
        return {"failure": engine.failure, "open": self._weight_update_active, "seconds": engine.seconds}

    def transfer_compare(self, contents: str, manifest: str) -> None:
        """Compare this rank's weights with those that a `Contents` and a `Manifest` (as JSON) describe; the outcome is told by
        `transfer_outcome`."""
        self.weight_transfer_engine.compare(contents, manifest)


class ManifestWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Checks a version against its manifest, then loads it layer by layer, then compares. vLLM makes one on each rank."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    failure = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parallel = self.parallel_config
        tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        layout = EngineLayout(tensor, pipeline, tensor if parallel.enable_expert_parallel else 1)
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        if parallel.enable_expert_parallel and parallel.data_parallel_size > 1:
            raise TransferError("experts that are shared by data parallel ranks are not planned for; start without one of both")
        folder = self.model_config.model
        self._seat = Seat(shape_of_any(folder), layout, parallel.rank % layout.ranks, dtype, fp8_format(read_config(folder)))
        self._tied = self._seat.shape.tied_embeddings
        self._receiver = Receiver(self._seat)
        self._manifest: Manifest | None = None
        self._addresses: dict[str, int] = {}

    @_kept
    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Agree with a trainer on what will travel; only the trainer that did so last may update."""
        self._receiver.agree(Contents.from_json(init_info.contents))

    def start_weight_update(self) -> None:
        # The model is not touched before its new weights have been verified.
        self._manifest = None

    @_kept
    def update_weights(self, update_info: dict[str, Any]) -> None:
        # As the base method, which synchronises an accelerator that a host does not have.
        self.receive_weights(self.parse_update_info(update_info))
        wait_for(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verify the whole version, then load it: a bad manifest or damaged bytes leave the old weights untouched."""
        manifest = Manifest.from_json(update_info.manifest)
        self._receiver.take(manifest)
        expected = {name for name, _ in self.model.named_parameters()}
        self._addresses = addresses(self.model)
        self._forget_packing_of_experts()
        # The host's linear layers are repacked after loading; a layerwise reload undoes and redoes that.
        initialize_layerwise_reload(self.model)
        # What a layer makes of its weights, such as the scales of --quantization fp8, is not there now and does not come.
        expected &= {name for name, _ in self.model.named_parameters()}
        try:
            loaded = self._receiver.load(self.model.load_weights)
            if missed := expected - set(loaded):
                raise TransferError(f"version {manifest.version} brought nothing for {sorted(missed)[:3]} of the model")
        except BaseException:
            # Layers still wait for weights, which will not come: without this the next update would begin in that state.
            finalize_layerwise_reload(self.model, self.model_config)
            raise
        self._manifest = manifest

    def _forget_packing_of_experts(self) -> None:
        """Have the host's experts packed again after loading.

        vLLM 0.32 packs them where it makes their kernel, which it does once: without this they would compute with unpacked
        weights after an update (unquantized_fused_moe_method.py, _setup_kernel).
        """
        for module in self.model.modules():
            if _expert_packing(module):
                module.quant_method.moe_kernel = None

    @_kept
    def finish_weight_update(self) -> None:
        """Repack the loaded weights, and compare them with those that were sent if the manifest asks for it."""
        if self._manifest is None:
            raise TransferError(self.failure or "no weights came between the start and the end of an update")
        finalize_layerwise_reload(self.model, self.model_config)
        if self._tied and hasattr(self.model, "lm_head"):
            # A tied output layer has no tensor of its own, so the reload leaves the copy that it packed for itself
            # from the last weights; pack it again from the embedding.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)
        wait_for(self.device)
        check_unmoved(self._addresses, self.model)
        # Quantised engines transpose and requantise what they load.
        if self._manifest.compare and self._seat.fp8 is None and self.model_config.quantization is None:
            self._receiver.compare(self._weights().read)
        self._manifest = None

    @_kept
    def compare(self, contents: str, manifest: str) -> None:
        """Compare the model's weights with those that a `Contents` and a `Manifest` (as JSON) describe."""
        sent = Contents.from_json(json.loads(contents)), Manifest.from_json(json.loads(manifest))
        compare_only(self._seat, *sent, self._weights().read)

    def _weights(self) -> EngineWeights:
        return EngineWeights(self.model, self._receiver.names, plain, tied=self._tied)

    @property
    def seconds(self) -> dict[str, float]:
        return self._receiver.seconds

    def shutdown(self) -> None:
        # Unmaps the senders' memory.
        self._receiver.close()


def plain(module: nn.Module, parameter: str) -> Tensor:
    """Return the weight that a module computes with, unpacked where vLLM's host build keeps a packed copy."""
    if parameter == "weight" and hasattr(module, "cpu_linear"):
        return _through(module)
    if parameter in ("w13_weight", "w2_weight") and (isa := _expert_packing(module)):
        return _unpacked(getattr(module, parameter), isa)
    return plain_parameter(module, parameter)


def _through(module: nn.Module) -> Tensor:
    """Return the weight of a packed linear layer, by applying it to unit vectors: every sum has one term, so it is exact."""
    width = next(getattr(module, n) for n in ("input_size_per_partition", "input_size", "embedding_dim") if hasattr(module, n))
    unit = torch.eye(width, dtype=module.params_dtype)
    return module.cpu_linear(unit, module.weight, None).t()


def _expert_packing(module: nn.Module) -> str | None:
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return getattr(getattr(kernel, "fused_experts", None), "isa", None)


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """Undo the packing of experts, which permutes the elements of each.

    Where an element went is found by packing the elements' numbers, digit by digit in a base that every dtype holds exactly.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    base, shape = 128, packed.shape[1:]  # digits below it are exact in any dtype
    numbers = torch.arange(shape.numel())
    came_from = torch.zeros_like(numbers)
    for digit in itertools.count():
        if base**digit >= shape.numel():
            break
        part = (numbers // base**digit % base).to(packed.dtype).view(1, *shape)
        came_from += cpu_prepack_moe_weight(part, isa).flatten().long() * base**digit
    dense = torch.empty_like(packed).flatten(1)
    dense[:, came_from] = packed.flatten(1)
    return dense.view_as(packed)


def register() -> None:
    """Add the backend to vLLM's factory. Entry point, called by vLLM in each of its processes, sometimes more than once."""
    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(BACKEND, ManifestWeightTransferEngine)
