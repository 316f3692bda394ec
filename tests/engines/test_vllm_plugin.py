"""vLLM's receiver of weights, without an engine around it."""

import pytest
import torch

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
