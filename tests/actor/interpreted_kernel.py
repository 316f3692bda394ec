"""The Triton passes in Triton's interpreter, against torch. `test_logprob_kernel.py` runs this file with TRITON_INTERPRET=1."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_hpt.actor.model import logprob, logprob_kernel
from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy
from megatron_hpt.actor.model.logprob_choice import passes_by
from megatron_hpt.actor.model.logprob_kernel import LOWEST, TRITON, gradient_kernel, statistics_kernel
from tests.actor.test_logprob import check_two_ranks

INFINITE = float("inf")


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of 16 tokens and 128 columns, which a program reads in two blocks."""
    monkeypatch.setattr(logprob_kernel, "TILE_TOKENS", 16)
    monkeypatch.setattr(logprob_kernel, "BLOCK", 64)
    monkeypatch.setattr(logprob, "CHUNK_BYTES", 4 * 16 * 128)


def both_passes(hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary) -> list[list[Tensor]]:
    """Values and gradients by torch and by Triton."""
    results = []
    for kernel in ("torch", "triton"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        values = torch.stack(logprob_and_entropy(*leaves, targets, vocabulary, passes_by(kernel)))
        (values * factors(len(hidden))).sum().backward()
        results.append([values.detach(), *(leaf.grad for leaf in leaves)])
    return results


def factors(tokens: int) -> Tensor:
    """How much each value counts in the loss, [2, tokens]."""
    return torch.rand(2, tokens, generator=torch.Generator().manual_seed(5)) - 0.3


def problem(tokens: int, rows: int, real: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 8, generator=generator), torch.randn(rows, 8, generator=generator) * scale
    return hidden, weight, torch.randint(real, (tokens,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("tokens", "rows", "real"), [(1, 5, 5), (16, 128, 128), (19, 301, 299), (20, 130, 129), (5, 700, 513), (0, 9, 9)]
)
def test_values_and_gradients_equal_those_of_torch(group, tiles, temperature, tokens, rows, real) -> None:
    hidden, weight, targets = problem(tokens, rows, real)
    expected, found = both_passes(hidden, weight, targets, Vocabulary(real, 0, group, temperature))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.count_nonzero(found[2][real:]) == 0


def test_one_tile_of_tokens_equals_several(group, tiles, monkeypatch) -> None:
    hidden, weight, targets = problem(19, 301, 299)
    _, several = both_passes(hidden, weight, targets, Vocabulary(299, 0, group))
    monkeypatch.setattr(logprob_kernel, "TILE_TOKENS", 64)
    _, one = both_passes(hidden, weight, targets, Vocabulary(299, 0, group))
    for a, b in zip(several, one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_logits_of_ten_thousand_neither_overflow_nor_vanish(group, tiles) -> None:
    hidden, weight, targets = problem(20, 301, 301, scale=3000.0)
    assert float((hidden @ weight.T).abs().max()) > 1e4
    expected, found = both_passes(hidden, weight, targets, Vocabulary(301, 0, group))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_an_impossible_token_has_no_nan(group) -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [-1e38], [1.0]])
    expected, found = both_passes(hidden, weight, torch.tensor([2]), Vocabulary(3, 0, group))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_ranks_of_a_vocabulary_equal_the_dense_computation(tmp_path) -> None:
    check_two_ranks(tmp_path, "triton")


def test_a_tile_is_the_only_large_tensor(group, tiles, monkeypatch) -> None:
    sizes, made = [], logprob.product

    def product(left: Tensor, right: Tensor) -> Tensor:
        result = made(left, right)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(logprob_kernel, "product", product)
    hidden, weight, targets = problem(19, 301, 299)
    both_passes(hidden, weight, targets, Vocabulary(299, 0, group))
    assert max(sizes) == logprob.CHUNK_BYTES // 4


def statistics(logits: Tensor, cuts: list[int], columns: Tensor, temperature: float = 1.0) -> Tensor:
    """By the kernel, tile by tile."""
    into = torch.tensor([[LOWEST, 0.0, 0.0, 0.0]]).repeat(len(logits), 1)
    for start, end in zip([0, *cuts], [*cuts, logits.shape[1]], strict=True):
        tile = logits[:, start:end].contiguous()
        width = end - start
        statistics_kernel[(len(logits),)](tile, columns - start, into, tile.stride(0), width, 1 / temperature, BLOCK=16)
    return into


def gradient(logits: Tensor, columns: Tensor, per_token: Tensor, dtype: torch.dtype, over_logits: bool) -> Tensor:
    """By the kernel, into a tensor of its own or over the logits."""
    logits, (rows, width) = logits.clone(), logits.shape
    grad = logits.view(dtype)[:, :width] if over_logits else torch.empty(rows, width, dtype=dtype)
    gradient_kernel[(rows,)](logits, grad, columns, per_token, width, grad.stride(0), width, 1.0, BLOCK=16)
    return grad.clone()


def of_distribution(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Log-partition and entropy."""
    maximum, normaliser, weighted, _ = statistics.double().unbind(1)
    return maximum + normaliser.log(), normaliser.log() - weighted / normaliser


@given(data=st.data(), width=st.integers(1, 70), rows=st.integers(1, 3), temperature=st.sampled_from([1.0, 0.5, 2.0]))
@settings(max_examples=30)
def test_statistics_do_not_depend_on_tiles(data, width: int, rows: int, temperature: float) -> None:
    numbers = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-5, 5, width=32), st.just(-INFINITE))
    values = data.draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))
    logits = torch.tensor(values).view(rows, width)
    columns = torch.tensor(data.draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows)))
    logits[:, 0] = torch.where(logits.isinf().all(1), 1.0, logits[:, 0])  # some token is possible
    cuts = sorted(data.draw(st.sets(st.integers(1, width - 1), max_size=3))) if width > 1 else []
    found = statistics(logits, cuts, columns, temperature)
    logp = (logits.double() / temperature).log_softmax(1)
    log_partition, entropy = of_distribution(found)
    torch.testing.assert_close(log_partition, (logits.double() / temperature).logsumexp(1), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).nan_to_num(0).sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 3], logits.gather(1, columns[:, None]).squeeze(1) / temperature)


@pytest.mark.parametrize("cuts", [[], [32]])
@pytest.mark.parametrize("impossible", [-INFINITE, -1e38])
def test_impossible_tokens_before_the_first_possible_one(cuts: list[int], impossible: float) -> None:
    logits = torch.full((1, 48), impossible)
    logits[0, 40:] = torch.arange(8.0)
    found = statistics(logits, cuts, torch.tensor([47]))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(of_distribution(found)[0], torch.arange(8.0, dtype=torch.float64).logsumexp(0)[None])
    per_token = torch.tensor([[float(of_distribution(found)[0]), 1.0, 0.7, 0.3, 0.3]])
    assert torch.count_nonzero(gradient(logits, torch.tensor([47]), per_token, torch.float32, True)[0, :40]) == 0


@pytest.mark.parametrize("where", [0, 20])
def test_a_logit_that_is_no_number_stays_none(where: int) -> None:
    logits = torch.zeros(1, 24)
    logits[0, where] = float("nan")
    found = statistics(logits, [], torch.tensor([3]))
    assert found[0, 1:3].isnan().all()
    per_token = torch.tensor([[float(found[0, 1]), 0.0, 1.0, 1.0, 1.0]])
    assert gradient(logits, torch.tensor([3]), per_token, torch.float32, True).isnan().all()


@given(data=st.data(), width=st.integers(1, 70), rows=st.integers(1, 3))
@settings(max_examples=30)
def test_gradients_over_the_logits_equal_those_beside_them(data, width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, width, generator=generator) * data.draw(st.sampled_from([0.1, 3.0, 100.0]))
    columns = torch.randint(width, (rows, 1), generator=generator)
    logp = logits.log_softmax(1)
    per_token = torch.stack([logits.logsumexp(1), -(logp.exp() * logp).sum(1), *torch.randn(3, rows, generator=generator)], 1)
    expected = logits.clone()
    logprob._to_gradient_(expected, per_token, columns, 1.0)
    beside = gradient(logits, columns[:, 0], per_token, torch.float32, over_logits=False)
    torch.testing.assert_close(beside, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient(logits, columns[:, 0], per_token, torch.float32, over_logits=True), beside)
    narrow = gradient(logits, columns[:, 0], per_token, torch.bfloat16, over_logits=True)
    torch.testing.assert_close(narrow.float(), beside, rtol=2**-7, atol=1e-30)


@pytest.fixture
def bfloat16(monkeypatch):
    """Keeps weights in bfloat16, as on GPUs, with float32 products; the host itself widens weights first."""
    for module in (logprob, logprob_kernel):
        monkeypatch.setattr(module, "product", lambda left, right: left.float() @ right.float())
        monkeypatch.setattr(module, "real_rows", lambda weight, vocabulary: weight[: vocabulary.size])


def test_a_model_in_bfloat16(group, tiles, bfloat16) -> None:
    hidden, weight, targets = (t if t.dtype is torch.long else t.bfloat16() for t in problem(19, 301, 299))
    vocabulary = Vocabulary(299, 0, group)
    _, found = both_passes(hidden, weight, targets, vocabulary)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logp = (exact[0] @ exact[1][:299].T).log_softmax(1)
    values = torch.stack([logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)])
    (values * factors(19)).sum().backward()
    torch.testing.assert_close(found[0].double(), values.detach(), rtol=1e-5, atol=1e-5)
    for ours, leaf in zip(found[1:], exact, strict=True):
        assert ours.dtype is torch.bfloat16
        error = float((ours.double() - leaf.grad).norm() / leaf.grad.norm())
        assert error < 8e-3  # the interpreter cuts bits off where GPUs round


def test_many_tiles_of_tokens_are_added_up_in_float32(group, bfloat16, monkeypatch) -> None:
    """In bfloat16 a sum of equal numbers stops growing at 256 of them."""
    monkeypatch.setattr(logprob_kernel, "BLOCK", 16)
    hidden, weight = torch.ones(600, 2).bfloat16(), torch.tensor([[0.0, 1.0], [2.0, -1.0]]).bfloat16()
    gradients = []
    for tokens in (1, 600):
        monkeypatch.setattr(logprob_kernel, "TILE_TOKENS", tokens)
        leaf = weight.clone().requires_grad_()
        values = logprob_and_entropy(hidden, leaf, torch.zeros(600, dtype=torch.long), Vocabulary(2, 0, group), TRITON)
        values[0].sum().backward()
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=0)
