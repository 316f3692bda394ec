"""Whether samples follow from seeds: what decides it, and what clients then ask for."""

import asyncio
from pathlib import Path

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_hpt.engines.checks import check_started_engine
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.engines.seeding import settled
from megatron_hpt.engines.types import SamplingRequest
from megatron_hpt.errors import ConfigError

REQUEST = SamplingRequest([1, 2], 3, 7, 1.0, 1.0, 4, 0)


def config(model: Path | str = "m", **rollout: object) -> Config:
    return Config(name="x", model=ModelConfig(path=str(model)), data=DataConfig(train="t"), rollout=RolloutConfig(**rollout))


@pytest.mark.parametrize(
    ("rollout", "on_gpus", "seeded"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"seeded": True}, True, True),
        ({"seeded": False}, True, False),
        ({"urls": ["http://a:1"]}, True, True),
        ({"urls": ["http://a:1"], "seeded": False}, False, False),
    ],
)
def test_seeds_are_the_default_where_they_cost_nothing(rollout: dict, on_gpus: bool, seeded: bool) -> None:
    found = settled(config(**rollout), on_gpus)
    assert found.rollout.seeded is seeded
    assert settled(found, not on_gpus).rollout.seeded is seeded  # what was decided stays
    assert settled(found, on_gpus) == found


async def body(engine: str, wanted: Config) -> dict:
    client = ENGINES[engine].client(wanted, "http://127.0.0.1:9")
    try:
        return client.body(REQUEST)
    finally:
        await client.close()


def test_a_client_asks_as_the_server_was_started(tiny_model: Path) -> None:
    def asked(engine: str, on_gpus: bool) -> dict:
        return asyncio.run(body(engine, settled(config(tiny_model, engine=engine), on_gpus)))

    assert asked("vllm", False)["sampling_params"]["seed"] == 7
    assert "seed" not in asked("vllm", True)["sampling_params"]
    assert asked("vllm", True)["sampling_params"].items() <= asked("vllm", False)["sampling_params"].items()
    for on_gpus in (True, False):  # a server in deterministic mode would make equal samples of none
        assert [each["sampling_seed"] for each in asked("sglang", on_gpus)["sampling_params"]] == [7, 8, 9]


def test_a_host_has_no_faster_mode(tiny_model: Path) -> None:
    wanted = config(tiny_model, seeded=False)
    check_started_engine(wanted, 16, on_gpus=True)
    with pytest.raises(ConfigError, match=r"^rollout\.seeded: given false; engines on a host .*set rollout\.seeded=true$"):
        check_started_engine(wanted, 16, on_gpus=False)
