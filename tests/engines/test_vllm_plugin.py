"""vLLM's receiver of weights, without an engine around it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_hpt.transfer.manifest import Manifest

pytestmark = pytest.mark.slow  # imports vLLM


@pytest.mark.parametrize(("device", "waits"), [("cuda", [torch.device("cuda")]), ("cpu", [])])
def test_an_update_is_over_when_the_device_has_done_it(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: list[torch.device]
) -> None:
    """vLLM's base method waits too; the sender's memory is read, and the next forward pass queued, as soon as it is over."""
    pytest.importorskip("vllm")
    from megatron_hpt.engines.vllm import plugin

    happened = []
    monkeypatch.setattr(torch.accelerator, "synchronize", happened.append)
    monkeypatch.setattr(plugin, "finalize_layerwise_reload", lambda *_: happened.append("finished"))
    engine = plugin.ManifestWeightTransferEngine.__new__(plugin.ManifestWeightTransferEngine)
    engine.device, engine.model, engine.model_config = torch.device(device), torch.nn.Linear(2, 2), None
    engine._tied, engine._addresses = False, {}
    engine.receive_weights = lambda info: happened.append("received")
    engine.update_weights({"manifest": {}})
    assert engine.failure == ""
    assert happened == ["received", *waits]
    happened.clear()
    engine._manifest = type("Manifest", (), {"compare": False})()
    engine.finish_weight_update()
    assert engine.failure == ""
    assert happened == ["finished", *waits]


@pytest.mark.parametrize(("quantization", "compared"), [(None, True), ("fp8", False)])
def test_what_a_layer_makes_of_its_weights_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, quantization: str | None, compared: bool
) -> None:
    """vLLM quantises a bfloat16 folder itself (--quantization fp8): scales come of the weights, whose bytes are others then."""
    pytest.importorskip("vllm")
    from megatron_hpt.engines.vllm import plugin

    layer = torch.nn.Linear(2, 2, bias=False)
    layer.scale = torch.nn.Parameter(torch.ones(1))
    happened = []
    receiver = SimpleNamespace(take=lambda manifest: None, load=lambda load: {"weight"}, compare=happened.append)
    monkeypatch.setattr(plugin, "initialize_layerwise_reload", lambda model: delattr(model, "scale"))
    monkeypatch.setattr(plugin, "finalize_layerwise_reload", lambda *_: None)
    engine = plugin.ManifestWeightTransferEngine.__new__(plugin.ManifestWeightTransferEngine)
    engine.device, engine.model, engine._tied, engine._receiver = torch.device("cpu"), layer, False, receiver
    engine.model_config, engine._seat = SimpleNamespace(quantization=quantization), SimpleNamespace(fp8=None)
    engine._weights = lambda: SimpleNamespace(read="read")
    layer.load_weights = lambda tensors: {"weight"}
    engine.update_weights({"manifest": Manifest("s", "c", 1, (), compare=True).to_json()})
    assert engine.failure == ""
    engine.finish_weight_update()
    assert engine.failure == ""
    assert happened == ["read"] * compared
