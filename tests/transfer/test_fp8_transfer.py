"""Weights that are converted on the way are, byte for byte, boxes of the whole tensors' conversion, on every engine rank."""

from dataclasses import replace

import pytest
import torch

from megatron_hpt.errors import ModelError, TransferError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import Place, ShardView, hf_tensor_shapes, parameters
from megatron_hpt.transfer.control import EngineControl, Memory, ServerLoad
from megatron_hpt.transfer.layouts import EngineLayout
from megatron_hpt.transfer.manifest import Contents, Manifest
from megatron_hpt.transfer.quantize import BLOCK_128, PER_TENSOR, Fp8Format, is_quantized, quantize
from megatron_hpt.transfer.receiver import Receiver, Seat
from megatron_hpt.transfer.sender import Target, TransferOptions, WeightSender
from megatron_hpt.transfer.wire_format import Wire, fp8_format

from .trainers import group

SHAPE = ModelShape("llama", 1, 256, 4, 2, 128, 512, 99, False, 1e4, 1e-6, 64)


class HostedRanks(EngineControl):
    """The receivers of an engine's ranks in this process, without an engine around them."""

    def __init__(self, layout: EngineLayout, fp8: Fp8Format | None, shape: ModelShape = SHAPE) -> None:
        super().__init__("http://here", 10)
        self.receivers = [Receiver(Seat(shape, layout, rank, "bfloat16", fp8)) for rank in range(layout.ranks)]
        self.held: list[dict[str, torch.Tensor]] = []
        self._layout, self._version = layout, None

    def prepare(self, contents: Contents) -> None:
        for receiver in self.receivers:
            receiver.agree(Contents.from_json(contents.to_json()))

    def _update(self, manifest: Manifest) -> dict[str, float]:
        self.held = []
        for receiver in self.receivers:
            receiver.take(manifest)
            self.held.append(receiver.load(lambda tensors: {name: tensor.clone() for name, tensor in tensors}))
        self._version = manifest.version
        return dict(self.receivers[0].seconds)

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def _sleep(self) -> None: ...

    def _wake(self, memory: Memory) -> None: ...

    def compare(self, contents: Contents, manifest: Manifest) -> None: ...

    def version(self) -> int | None:
        return self._version

    def load(self) -> ServerLoad:
        return ServerLoad(0, 0, 0.0)

    def layout(self) -> EngineLayout:
        return self._layout


def views(cut: int) -> tuple[dict[str, torch.Tensor], list[ShardView]]:
    """A model in bfloat16, its matrices held as `cut` slabs of rows."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in hf_tensor_shapes(SHAPE).items()}
    found = []
    for name, tensor in weights.items():
        pieces = cut if is_quantized(name) else 1
        rows = tensor.shape[0] // pieces
        for i in range(pieces):
            part = tensor[i * rows : (i + 1) * rows]
            found.append(ShardView(name, tuple(tensor.shape), (i * rows, *[0] * (tensor.dim() - 1)), tuple(part.shape), part))
    return weights, found


def expected(weights: dict[str, torch.Tensor], fp8: Fp8Format) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    fused = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gu", "up": "gu"}
    amax: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if is_quantized(name):
            key = fused.get(name.split(".")[-2].removesuffix("_proj"), name)
            amax[key] = torch.maximum(amax.get(key, torch.zeros(1)), tensor.float().abs().max().view(1))
    for name, tensor in weights.items():
        if not is_quantized(name):
            whole[name] = tensor
            continue
        known = amax[fused.get(name.split(".")[-2].removesuffix("_proj"), name)] if fp8 == PER_TENSOR else None
        view = ShardView(name, tuple(tensor.shape), (0, 0), tuple(tensor.shape), tensor)
        whole |= {part.name: part.view for part in quantize(view, fp8, known)}
    return whole


@pytest.mark.parametrize("fp8", [BLOCK_128, PER_TENSOR], ids=["blocks", "per tensor"])
@pytest.mark.parametrize("transport", ["shared_memory", "files"])
@pytest.mark.parametrize("tensor", [1, 2, 4])  # four ranks share two key/value heads
def test_what_arrives_is_a_box_of_the_converted_whole(tmp_path, fp8: Fp8Format, transport: str, tensor: int) -> None:
    weights, held = views(2)
    engine = HostedRanks(EngineLayout(tensor), fp8)
    options = TransferOptions(transport, fp8=fp8, folder=str(tmp_path))
    sender = WeightSender(held, SHAPE, [Target(engine, engine.layout())], group(), options)
    published = sender.publish(1)
    whole = expected(weights, fp8)
    assert published["weights/bytes"] == sum(t.nbytes for t in whole.values())
    for receiver, arrived in zip(engine.receivers, engine.held, strict=True):
        assert arrived.keys() == whole.keys()
        for name, box in receiver.names.items():
            assert arrived[name].dtype == whole[name].dtype
            sent, found = whole[name][box.slices].contiguous(), arrived[name][box.slices].contiguous()
            assert torch.equal(found.view(torch.uint8), sent.view(torch.uint8)), name
        receiver.close()
    sender.close()


def test_a_cut_through_blocks_is_refused_by_name() -> None:
    shape = replace(SHAPE, ffn=192)  # ranks of 96 rows
    engine = HostedRanks(EngineLayout(2), BLOCK_128, shape)
    weights = {name: torch.randn(size).bfloat16() for name, size in hf_tensor_shapes(shape).items()}
    held = [ShardView(n, tuple(t.shape), (0,) * t.dim(), tuple(t.shape), t) for n, t in weights.items()]
    sender = WeightSender(held, shape, [Target(engine, engine.layout())], group(), TransferOptions(fp8=BLOCK_128))
    with pytest.raises(TransferError, match=r"_proj.*cannot be quantised to FP8"):
        sender.publish(1)
    sender.close()


def shards(shape: ModelShape, ranks: int) -> list[ShardView]:
    """What tensor parallel ranks hold together."""
    return [
        view
        for parameter in parameters(shape)
        for rank in range(ranks)
        for view in parameter.rule.views(
            torch.ones(parameter.rule.shard_sizes(shape, ranks), dtype=torch.bfloat16),
            *(shape, Place(rank, ranks), parameter.indices),
        )
    ]


@pytest.mark.parametrize("head_dim", [128, 64])
def test_shards_through_query_groups_hold_whole_blocks_or_are_refused(head_dim: int) -> None:
    """Four tensor parallel ranks, two query groups: every second rank begins with a key head."""
    shape = replace(SHAPE, head_dim=head_dim)
    engine = HostedRanks(EngineLayout(), BLOCK_128, shape)
    arguments = (shards(shape, 4), shape, [Target(engine, engine.layout())], group(), TransferOptions(fp8=BLOCK_128))
    if head_dim == 64:
        with pytest.raises(
            TransferError, match=r"k_proj.weight \[128, 256\]: the box at \[0, 0\] \+ \[64, 256\] cannot be quant"
        ):
            WeightSender(*arguments)
        return
    sender = WeightSender(*arguments)
    sender.publish(1)
    assert all(bool((tensor.float() != 0).all()) for tensor in engine.held[0].values())
    sender.close()


def test_an_engine_of_another_format_is_refused() -> None:
    _, held = views(1)
    engine = HostedRanks(EngineLayout(), None)
    sender = WeightSender(held, SHAPE, [Target(engine, engine.layout())], group(), TransferOptions(fp8=BLOCK_128))
    with pytest.raises(TransferError, match=r"7 unknown \(.*weight_scale_inv"):
        sender.publish(1)
    sender.close()


def test_formats_that_a_configuration_asks_for() -> None:
    assert fp8_format({}) is None
    assert fp8_format({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}) == BLOCK_128
    assert fp8_format({"quantization_config": {"quant_method": "fp8"}}) == PER_TENSOR
    with pytest.raises(ModelError, match="weights are converted to quant_method fp8"):
        fp8_format({"quantization_config": {"quant_method": "awq"}})
    assert Wire(SHAPE, "bfloat16", BLOCK_128).row_multiple[next(n for n in hf_tensor_shapes(SHAPE) if "q_proj" in n)] == 128
