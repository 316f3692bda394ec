"""Our receiver inside vLLM: a weight-transfer backend of vLLM's own factory.

vLLM imports this in each of its processes through the entry point ``vllm.general_plugins``; a server that is started
with ``--weight-transfer-config '{"backend": "megatron_hpt"}'`` then uses it. This is the only module that imports vLLM.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_hpt.errors import TransferError
from megatron_hpt.weights.hf_config import model_shape
from megatron_hpt.weights.manifest import Manifest
from megatron_hpt.weights.mapping import hf_tensor_shapes
from megatron_hpt.weights.receiver import Receiver

BACKEND = "megatron_hpt"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One whole version."""

    manifest: dict[str, Any] = field(default_factory=dict)


class ManifestWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Verifies a manifest against the senders' memory, then loads it layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver = Receiver(hf_tensor_shapes(model_shape(self.model_config.model)))
        self._loading = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """No rendezvous: a manifest says where everything is."""

    def start_weight_update(self) -> None:
        """Nothing yet: the model is not touched before its new weights have been verified."""
        self._loading = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Overrides the base method, whose accelerator synchronisation does not exist on the host."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Verify everything, then load everything.

        Raises:
            TransferError: a bad manifest or damaged bytes (the old weights are untouched), or a parameter of the model
                that no tensor reached.
        """
        manifest = Manifest.from_json(update_info.manifest)
        self._receiver.verify(manifest)
        expected = {name for name, _ in self.model.named_parameters()}
        # The host's linear layers are repacked after loading; a layerwise reload undoes and redoes that.
        initialize_layerwise_reload(self.model)
        loaded = self.model.load_weights(self._receiver.tensors(manifest))
        if missed := expected - set(loaded):
            raise TransferError(f"version {manifest.version} brought nothing for {sorted(missed)[:3]} of the engine's model")
        self._loading = True

    def finish_weight_update(self) -> None:
        """Repack what was loaded.

        Raises:
            TransferError: no weights were received since the update was started.
        """
        if not self._loading:
            raise TransferError("finish_weight_update without weights: update_weights has not succeeded")
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model_config.hf_config.tie_word_embeddings:
            # A tied output layer has no tensor of its own, so the reload leaves the copy that it packed for itself
            # from the last weights; pack it again from the embedding.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)
        self._loading = False

    def shutdown(self) -> None:
        """Unmap the senders' memory."""
        self._receiver.close()


def register() -> None:
    """Entry point: add the backend to vLLM's factory, once a process."""
    with contextlib.suppress(ValueError):  # already registered: vLLM may load plugins more than once
        WeightTransferEngineFactory.register_engine(BACKEND, ManifestWeightTransferEngine)
