"""Log-probabilities and entropy against a dense float64 softmax, values and gradients."""

import pytest
import torch
import torch.distributed as dist

from megatron_hpt.actor.logprob import logprob_and_entropy


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padding", [0, 3])
def test_values_and_gradients_are_exact(group, temperature: float, padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, tokens = 13, 6
    logits = torch.randn(tokens, vocab + padding, generator=generator) * 4
    targets = torch.randint(vocab, (tokens,), generator=generator)
    weights = torch.randn(2, tokens, generator=generator)
    ours = logits.clone().requires_grad_()
    found = logprob_and_entropy(ours, targets, temperature=temperature, vocab=vocab, first=0, group=group)
    (torch.stack(found) * weights).sum().backward()

    dense = logits.double().requires_grad_()
    logp = (dense[:, :vocab] / temperature).log_softmax(-1)
    expected = (logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1))
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), dense.grad, rtol=1e-4, atol=1e-6)
    assert torch.count_nonzero(ours.grad[:, vocab:]) == 0


def test_an_impossible_token_has_no_nan(group) -> None:
    logits = torch.tensor([[0.0, float("-inf"), 1.0]], requires_grad=True)
    logp, entropy = logprob_and_entropy(logits, torch.tensor([2]), temperature=1.0, vocab=3, first=0, group=group)
    (logp + entropy).sum().backward()
    assert torch.isfinite(logits.grad).all()
