"""Reading an engine's weights back under Hugging Face names, from the modules that compute with them.

vLLM and SGLang share their fused modules: ``qkv_proj`` stacks q, k, v, ``gate_up_proj`` gate over up, a layer of experts
holds ``w13_weight`` [experts, 2 · ffn, hidden] and ``w2_weight`` [experts, hidden, ffn]. How a module's weight is made
plain is the engine's own (`Plain`): vLLM's host build keeps packed copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from megatron_hpt.errors import TransferError
from megatron_hpt.transfer.boxes import Box

_FUSED = {
    "q_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "k_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "v_proj": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
    "up_proj": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w2": "w2", "w3": "w3"}

Plain = Callable[[nn.Module, str], Tensor]
"""(module, parameter) → the weight that its arithmetic uses: [out, in], or [experts, out, in]."""


def plain_parameter(module: nn.Module, parameter: str) -> Tensor:
    """Return a parameter as it is, for engines that keep their weights as they were loaded."""
    return getattr(module, parameter)


def addresses(model: nn.Module) -> dict[str, int]:
    """Return where the weights of a model lie on a device, by name; of a model on the host none."""
    return {name: weight.data_ptr() for name, weight in model.named_parameters() if weight.device.type != "cpu"}


def check_unmoved(before: Mapping[str, int], model: nn.Module) -> None:
    """Refuse weights that an update has put elsewhere: CUDA graphs compute with what lies where they were captured, which a
    comparison of the model's own tensors does not see.

    Args:
        before: `addresses` before the update.

    Raises:
        TransferError: names the first weight that has moved.
    """
    for name, place in addresses(model).items():
        if before.get(name, place) != place:
            raise TransferError(f"{name}: the engine has put it elsewhere in memory, where its CUDA graphs do not look")


class EngineWeights:
    """One engine rank's weights by Hugging Face name and box."""

    def __init__(self, model: nn.Module, boxes: Mapping[str, Box], plain: Plain, *, tied: bool) -> None:
        """
        Args:
            boxes: the box of each tensor that this rank holds.
            tied: whether the output layer uses the embedding.
        """
        self._model, self._boxes, self._plain, self._tied = model, boxes, plain, tied
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, box: Box) -> Iterator[Tensor]:
        """Yield what stands at `box` of tensor `name`, once for each place where the engine keeps it."""
        inner = box.inside(self._boxes[name])
        stem, _, kind = name.rpartition(".")
        if ".experts." in name:
            yield self._expert(stem, self._boxes[name])[inner.slices]
            return
        parent, _, leaf = stem.rpartition(".")
        fused, parts = _FUSED.get(leaf, (leaf, (leaf,)))
        before = parts[: parts.index(leaf)]
        start = sum(self._boxes[f"{parent}.{other}.{kind}"].extent[0] for other in before)
        weight = self._weight(f"{parent}.{fused}" if parent else fused, kind)
        yield weight[start : start + self._boxes[name].extent[0]][inner.slices]
        if self._tied and name == "model.embed_tokens.weight" and self._has("lm_head"):
            yield self._weight("lm_head", kind)[: self._boxes[name].extent[0]][inner.slices]

    def _expert(self, stem: str, box: Box) -> Tensor:
        layer, _, rest = stem.partition(".experts.")
        expert, leaf = rest.split(".")
        first = min(int(n.split(".experts.")[1].split(".")[0]) for n in self._boxes if n.startswith(f"{layer}.experts."))
        module = f"{layer}.experts.routed_experts" if self._has(f"{layer}.experts.routed_experts") else f"{layer}.experts"
        which = _EXPERT[leaf]
        stacked = self._weight(module, "w2_weight" if which == "w2" else "w13_weight")[int(expert) - first]
        if which == "w2":
            return stacked[:, : box.extent[1]]
        half = stacked.shape[0] // 2  # may be padded
        return stacked[half * (which == "w3") :][: box.extent[0]]

    def _has(self, path: str) -> bool:
        try:
            self._model.get_submodule(path)
        except AttributeError:
            return False
        return True

    def _weight(self, path: str, parameter: str) -> Tensor:
        """Return a module's plain weight, keeping the last one: the parts of a fused module are read one after the other."""
        key = f"{path}.{parameter}"
        if self._last is None or self._last[0] != key:
            with torch.no_grad():
                self._last = (key, self._plain(self._model.get_submodule(path), parameter))
        return self._last[1]
