"""New weights while requests run: what is kept, computed again or asked again, and that no prefix is served with old keys."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_hpt.config import Config
from megatron_hpt.engines.pool import EnginePool, Patience
from megatron_hpt.engines.registry import engine_of
from megatron_hpt.engines.types import Sample, Sampler, SamplingRequest, Versions
from megatron_hpt.transfer.control import InFlight
from tests.engine_servers import Server, SharedEngines

from .trainers import Trainer

pytestmark = pytest.mark.slow
SENTINEL = [5 + i % 60 for i in range(48)]
"""Several blocks of a prefix cache."""
SHORT, LONG = [5, 15, 6, 20], 56
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest, shared_engines: SharedEngines) -> Server:
    return shared_engines.server(request.param)


class Policy:
    """The weights of a trainer by version, as transformers computes with them."""

    def __init__(self, trainer: Trainer, folder: Path, first: int) -> None:
        self._trainer, self.version = trainer, first - 1
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._weights: dict[int, dict[str, Tensor]] = {}

    def publish(self) -> None:
        """Send other weights as the next version."""
        self.version += 1
        for name, tensor in self._trainer.weights.items():
            if name.endswith("proj.weight"):
                tensor.mul_(1.25 if self.version % 2 else 0.8)
        self._weights[self.version] = {name: tensor.clone() for name, tensor in self._trainer.weights.items()}
        self._trainer.sender.publish(self.version)

    @torch.no_grad()
    def error(self, prompt: list[int], sample: Sample, version: int) -> float:
        """Largest error of the log-probabilities of those tokens of a sample that it says this version made."""
        self._model.load_state_dict(self._weights[version], strict=False)
        self._model.tie_weights()
        tokens = torch.tensor([*prompt, *sample.tokens.tolist()])
        logprobs = self._model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        exact = logprobs.gather(1, tokens[len(prompt) :, None])[:, 0]
        errors = (exact - torch.from_numpy(sample.logprobs.copy())).abs()
        made = torch.cat([torch.full((length,), number) for number, length in sample.spans]) == version
        return float(errors[made].max())


def sampled(config: Config, url: str, action: Callable, policy: Policy):
    """Run `action(sampler)`; it may use this version and the next."""

    async def run():
        pool = EnginePool([engine_of(config).client(config, url)], Patience(), period_s=0.05)
        try:
            async with pool.serving(Versions(policy.version, policy.version + 1)) as sampler:
                return await action(sampler), pool.retried
        finally:
            await pool.close()

    return asyncio.run(run())


async def ask(sampler: Sampler, prompt: list[int], tokens: int, samples: int = 1) -> list[Sample]:
    return await sampler.generate(SamplingRequest(prompt, samples, 7, 1.0, 1.0, tokens, 1))


async def until_served(sampler: Sampler, policy: Policy) -> None:
    """Wait until the pool knows of the version that was published last."""
    while sampler._pool._servers[0].version != policy.version:
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", InFlight)
def test_an_update_under_way(server: Server, mode: InFlight) -> None:
    """The same prefix before, during and after the update has the log-probabilities of the weights that its tokens name."""
    config = server.config.model_copy(deep=True)
    config.transfer.in_flight = mode.value
    trainer = Trainer(config, [server.url], 60.0)
    policy = Policy(trainer, Path(server.config.model.path), (server.control().version() or 0) + 1)
    policy.publish()

    async def action(sampler: Sampler):
        (before,) = await ask(sampler, SENTINEL, 4)
        running = [asyncio.create_task(ask(sampler, prompt, LONG - len(prompt) + 4, 4)) for prompt in (SHORT, SENTINEL)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(policy.publish)
        under_way = [sample for task in running for sample in await task]
        await until_served(sampler, policy)
        (after,) = await ask(sampler, SENTINEL, 4)
        return before, under_way, after

    for _ in range(5):  # until some request was under way
        (before, under_way, after), retried = sampled(config, server.url, action, policy)
        old, new = policy.version - 1, policy.version
        if retried or any(len(sample.spans) > 1 for sample in under_way):
            break
    assert [version for version, _ in before.spans] == [old]
    assert policy.error(SENTINEL, before, old) < TOLERANCE
    assert [version for version, _ in after.spans] == [new]
    assert policy.error(SENTINEL, after, new) < TOLERANCE
    for sample, prompt in zip(under_way, [SHORT] * 4 + [SENTINEL] * 4, strict=True):
        versions = [version for version, _ in sample.spans]
        assert sum(length for _, length in sample.spans) == len(sample.tokens)
        if versions[0] == old:
            assert policy.error(prompt, sample, old) < TOLERANCE
        if (
            versions[-1] == new and mode is not InFlight.KEEP
        ):  # kept keys are those of the old weights, so tokens are of neither
            assert policy.error(prompt, sample, new) < TOLERANCE
    if mode is InFlight.ABORT:
        assert retried
        assert all(len(sample.spans) == 1 for sample in under_way)
    else:
        assert not retried
        assert any(len(sample.spans) == 2 for sample in under_way)
    trainer.close()
