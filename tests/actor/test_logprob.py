"""Log-probabilities and entropy against a dense float64 softmax, values and gradients."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_hpt.actor.model import logprob
from megatron_hpt.actor.model.logprob import Vocabulary, logprob_and_entropy
from megatron_hpt.actor.model.logprob_choice import check_kernel, passes_by
from megatron_hpt.errors import ConfigError


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


MEMORY = """
import torch, torch.distributed as dist
from pathlib import Path
from megatron_hpt.actor.model import logprob
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
status = lambda key: next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
hidden, weight = torch.randn(6144, 16, requires_grad=True), torch.randn(100_000, 16, requires_grad=True)
targets, vocabulary = torch.randint(100_000, (6144,)), logprob.Vocabulary(100_000, 0, dist.group.WORLD)
for tokens in (256, 6144):  # the first one pays for what every size needs
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    sum(logprob.logprob_and_entropy(hidden[:tokens], weight, targets[:tokens], vocabulary)).sum().backward()
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * logprob.CHUNK_BYTES  # the dense logits are nine


def _one_of_two_ranks(rank: int, folder: str, kernel: str) -> None:
    """Half of a vocabulary of 17 rows and one that pads; keeps what this rank computed."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    hidden, whole, targets, weights = _problem()
    weight = whole.chunk(2)[rank].float().clone().requires_grad_()
    hidden = hidden.float().requires_grad_()
    vocabulary = Vocabulary(17, 9 * rank, dist.group.WORLD, 0.7)
    found = torch.stack(logprob_and_entropy(hidden, weight, targets, vocabulary, passes_by(kernel)))
    (found * weights).sum().backward()
    torch.save({"found": found.detach(), "hidden": hidden.grad, "weight": weight.grad}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 18))
    return hidden, weight, torch.randint(17, (40,), generator=generator), torch.rand(2, 40, generator=generator)


@pytest.mark.slow
def test_two_ranks_of_a_vocabulary_equal_the_dense_computation(tmp_path) -> None:
    check_two_ranks(tmp_path, "torch")


def check_two_ranks(folder: Path, kernel: str) -> None:
    """Compare two processes, whose passes are the kernel's, with the whole vocabulary in one matrix."""
    torch.multiprocessing.spawn(_one_of_two_ranks, (str(folder), kernel), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]
    hidden, weight, targets, weights = _problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = (hidden @ weight[:17].T / 0.7).log_softmax(-1)
    expected = torch.stack([logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)])
    (expected * weights).sum().backward()
    assert torch.equal(ranks[0]["found"], ranks[1]["found"])
    gradients = ranks[0]["hidden"] + ranks[1]["hidden"], torch.cat([rank["weight"] for rank in ranks])
    for ours, theirs in zip((ranks[0]["found"], *gradients), (expected, hidden.grad, weight.grad), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize(
    ("has_gpu", "has_triton", "message"),
    [
        (False, False, r"'triton', which needs a GPU, found none; Triton \(package triton\), found none\. Install"),
        (False, True, r"needs a GPU, found none\. Install or change that, or set actor\.logprob_kernel=torch"),
        (True, False, r"needs Triton \(package triton\), found none\. Install"),
    ],
)
def test_what_the_kernel_lacks_is_named(monkeypatch, has_gpu: bool, has_triton: bool, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_triton else None)
    check_kernel("torch")
    with pytest.raises(ConfigError, match=message):
        check_kernel("triton")


def test_the_kernel_runs_where_nothing_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_kernel("triton")


@pytest.mark.slow
def test_predictions_are_made_by_the_kernel_of_the_settings(monkeypatch) -> None:
    from megatron_hpt.actor import predictions

    passes = []
    monkeypatch.setattr(predictions, "passes_by", lambda kernel: f"passes of {kernel}")
    monkeypatch.setattr(predictions, "logprob_and_entropy", lambda *given: passes.append(given[-1]) or (torch.ones(2),) * 2)
    monkeypatch.setattr(predictions, "copy_to_tensor_model_parallel_region", lambda hidden: hidden)
    monkeypatch.setattr(predictions.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    settings = SimpleNamespace(actor=SimpleNamespace(logprob_kernel="triton"), rollout=SimpleNamespace(temperature=1.0))
    ranks = SimpleNamespace(tensor=SimpleNamespace(rank=0))
    model = SimpleNamespace(output_weight=torch.zeros(5, 4), config=SimpleNamespace(sequence_parallel=False))
    batch = SimpleNamespace(
        predicted=torch.tensor([0, 2]),
        targets=torch.tensor([1, 2, 3]),
        tokens=torch.zeros(1, 3),
        packing=SimpleNamespace(context_size=1),
    )
    predictions.model_logprobs(torch.zeros(3, 1, 4), batch, model, SimpleNamespace(config=settings, vocab=5, ranks=ranks))
    assert passes == ["passes of triton"]
