"""Log-probabilities and entropy against a dense float64 softmax, values and gradients."""

import pytest
import torch
import torch.distributed as dist

from megatron_hpt.actor import logprob
from megatron_hpt.actor.logprob import Vocabulary, logprob_and_entropy


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_exact(group, monkeypatch, dtype, temperature: float, padding: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, tokens, width = 13, 6, 8
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 4 * (vocab + padding) * chunk)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab + padding, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    weights = torch.randn(2, tokens, generator=generator)
    found = torch.stack(logprob_and_entropy(hidden, weight, targets, Vocabulary(vocab, 0, group, temperature)))
    (found * weights).sum().backward()

    dense = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp = (dense[0] @ dense[1][:vocab].T / temperature).log_softmax(-1)
    expected = torch.stack([logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)])
    (expected * weights).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    if dtype is torch.bfloat16:
        tolerance = {"rtol": 2**-8, "atol": 1e-3}  # gradients are rounded to it
    for ours, theirs in zip((hidden, weight), dense, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    assert torch.count_nonzero(weight.grad[vocab:]) == 0


def test_an_impossible_token_has_no_nan(group) -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [-1e38], [1.0]], requires_grad=True)
    both = logprob_and_entropy(hidden, weight, torch.tensor([2]), Vocabulary(3, 0, group))
    sum(both).sum().backward()
    assert torch.isfinite(both[0]).all()
    assert torch.isfinite(hidden.grad).all()


def test_no_token_is_no_error(group) -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logp, entropy = logprob_and_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), Vocabulary(5, 0, group))
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == (0,)
    assert torch.count_nonzero(weight.grad) == 0
