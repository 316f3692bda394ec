"""Storages that rest on the host, and an actor that trains with them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.actor.optimizer.offload import Resting, pinned_sizes
from megatron_hpt.config import ActorConfig, AlgorithmConfig, KlConfig, ModelConfig

from .test_actor import Layouts


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("offload"), tiny_model)


def test_storages_come_back_under_every_view() -> None:
    whole = torch.arange(12, dtype=torch.float32)
    row, other = whole.view(3, 4)[1], torch.ones(5, dtype=torch.bfloat16)
    rest = Resting([row, whole, other])
    assert rest.nbytes == 12 * 4 + 5 * 2
    for _ in range(2):
        rest.leave()
        rest.leave()
        assert whole.untyped_storage().nbytes() == 0
        assert other.untyped_storage().nbytes() == 0
        rest.come_back()
        rest.come_back()
        assert row.tolist() == [4, 5, 6, 7]
        assert other.tolist() == [1] * 5
        assert row.data_ptr() == whole.data_ptr() + 16


def test_contents_that_nobody_needs_are_not_kept() -> None:
    gradient = torch.ones(7)
    rest = Resting([gradient], keep=False)
    rest.leave()
    assert gradient.untyped_storage().nbytes() == 0
    rest.come_back()
    assert gradient.fill_(2).tolist() == [2] * 7


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optimizer", "all"])
def test_an_offloaded_actor_trains_saves_and_resumes_bit_for_bit(layouts: Layouts, kind: str) -> None:
    def sections(kind: str) -> dict:
        kl = AlgorithmConfig(name="hpt", kl=KlConfig(coefficient=0.1))
        model = ModelConfig(path=str(layouts.model), dtype="bfloat16")
        return {"algorithm": kl, "model": model, "actor": ActorConfig(micro_batch_tokens=64, offload=kind)}

    plain = layouts.run(f"plain_{kind}", sections=sections("none"), data=2)
    saved = str(layouts.folder / f"saved_{kind}")
    layouts.run(f"before_{kind}", "--save", saved, last=2, sections=sections(kind), data=2)
    found = layouts.run(f"offload_{kind}", "--load", saved, first=2, sections=sections(kind), data=2)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in plain.weights.items())


@given(st.integers(0, 1 << 44))
def test_pinned_pieces_are_powers_of_two_and_waste_less_than_a_mebibyte(nbytes: int) -> None:
    sizes = pinned_sizes(nbytes)
    assert sum(sizes) == nbytes
    assert all(size & (size - 1) == 0 for size in sizes[:-1])
    assert sum(1 << (size - 1).bit_length() for size in sizes) - nbytes < 1 << 20
