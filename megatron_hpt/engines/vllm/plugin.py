"""Our receiver inside vLLM: a weight-transfer backend of vLLM's own factory.

vLLM imports this in each of its processes through the entry point ``vllm.general_plugins``; a server that is started
with ``--weight-transfer-config '{"backend": "megatron_hpt"}'`` then uses it. This is the only module that imports vLLM.

Nothing here raises out of a call: in vLLM 0.32 an error on one of several ranks leaves the other ranks' replies in their
queues, and every later call gets the reply of the one before (v1/executor/multiproc_executor.py, get_response). Each rank
keeps its outcome instead, and `Outcomes` tells it.
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
from megatron_hpt.transfer.readback import EngineWeights, plain_parameter
from megatron_hpt.transfer.receiver import Receiver, Seat, compare_only
from megatron_hpt.transfer.wire import fp8_format

BACKEND = "megatron_hpt"
logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What will travel."""

    contents: dict[str, Any] = field(default_factory=dict)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One whole version."""

    manifest: dict[str, Any] = field(default_factory=dict)


def _kept(method: Callable[..., None]) -> Callable[..., None]:
    """Keep what a call meets, for `Outcomes`; see the top of this module for why it is not raised."""

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
    """What a server's workers can be asked beside vLLM's own methods (``--worker-extension-cls``)."""

    def transfer_outcome(self) -> dict[str, Any]:
        """``failure``: what this rank's last step of a transfer met, or nothing; ``open``: an update has been started."""
        engine = self.weight_transfer_engine
        return {"failure": engine.failure, "open": self._weight_update_active, "seconds": engine.seconds}

    def transfer_compare(self, contents: str, manifest: str) -> None:
        """Compare this rank's weights with others (JSON of `Contents` and `Manifest`); see `transfer_outcome`."""
        self.weight_transfer_engine.compare(contents, manifest)


class ManifestWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Checks a version against its manifest, then loads it layer by layer, then compares."""

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

    @_kept
    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Agree on what will travel; the trainer that did this last is the one that may update."""
        self._receiver.agree(Contents.from_json(init_info.contents))

    def start_weight_update(self) -> None:
        """Nothing yet: the model is not touched before its new weights have been verified."""
        self._manifest = None

    @_kept
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Overrides the base method, whose accelerator synchronisation does not exist on the host."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verify everything, then load everything: a bad manifest or damaged bytes leave the old weights untouched."""
        manifest = Manifest.from_json(update_info.manifest)
        self._receiver.take(manifest)
        expected = {name for name, _ in self.model.named_parameters()}
        self._forget_packing_of_experts()
        # The host's linear layers are repacked after loading; a layerwise reload undoes and redoes that.
        initialize_layerwise_reload(self.model)
        try:
            loaded = self._receiver.load(self.model.load_weights)
            if missed := expected - set(loaded):
                raise TransferError(f"version {manifest.version} brought nothing for {sorted(missed)[:3]} of the model")
        except BaseException:
            # Layers wait for weights that will not come: without this the next update would start among them.
            finalize_layerwise_reload(self.model, self.model_config)
            raise
        self._manifest = manifest

    def _forget_packing_of_experts(self) -> None:
        """The host's experts are packed by the step that makes their kernel, which vLLM 0.32 takes once: without this
        they would compute with unpacked weights after an update (unquantized_fused_moe_method.py, _setup_kernel)."""
        for module in self.model.modules():
            if _expert_packing(module):
                module.quant_method.moe_kernel = None

    @_kept
    def finish_weight_update(self) -> None:
        """Repack what was loaded, and compare it with what was sent where the manifest asks for it."""
        if self._manifest is None:
            raise TransferError(self.failure or "no weights came between the start and the end of an update")
        finalize_layerwise_reload(self.model, self.model_config)
        if self._tied and hasattr(self.model, "lm_head"):
            # A tied output layer has no tensor of its own, so the reload leaves the copy that it packed for itself
            # from the last weights; pack it again from the embedding.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)
        if self._manifest.compare and self._seat.fp8 is None:  # FP8 engines transpose and requantise what they load
            self._receiver.compare(self._weights().read)
        self._manifest = None

    @_kept
    def compare(self, contents: str, manifest: str) -> None:
        """Compare the model with weights from elsewhere."""
        sent = Contents.from_json(json.loads(contents)), Manifest.from_json(json.loads(manifest))
        compare_only(self._seat, *sent, self._weights().read)

    def _weights(self) -> EngineWeights:
        return EngineWeights(self.model, self._receiver.names, plain, tied=self._tied)

    @property
    def seconds(self) -> dict[str, float]:
        """See `Receiver.seconds`."""
        return self._receiver.seconds

    def shutdown(self) -> None:
        """Unmap the senders' memory."""
        self._receiver.close()


def plain(module: nn.Module, parameter: str) -> Tensor:
    """A weight as the module computes with it; packed copies of vLLM's host build are undone."""
    if parameter == "weight" and hasattr(module, "cpu_linear"):
        return _through(module)
    if parameter in ("w13_weight", "w2_weight") and (isa := _expert_packing(module)):
        return _unpacked(getattr(module, parameter), isa)
    return plain_parameter(module, parameter)


def _through(module: nn.Module) -> Tensor:
    """Unit vectors through a packed linear layer: every sum has one term, so the weight comes out exactly."""
    width = next(getattr(module, n) for n in ("input_size_per_partition", "input_size", "embedding_dim") if hasattr(module, n))
    unit = torch.eye(width, dtype=module.params_dtype)
    return module.cpu_linear(unit, module.weight, None).t()


def _expert_packing(module: nn.Module) -> str | None:
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    return getattr(getattr(kernel, "fused_experts", None), "isa", None)


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """Packing permutes the elements of an expert: packing their numbers, digit by digit, says where each went."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    base, shape = 128, packed.shape[1:]  # small integers, exact in any dtype
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
    """Entry point: add the backend to vLLM's factory, once a process."""
    with contextlib.suppress(ValueError):  # already registered: vLLM may load plugins more than once
        WeightTransferEngineFactory.register_engine(BACKEND, ManifestWeightTransferEngine)
