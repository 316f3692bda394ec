"""Reward models behind real servers: their scores are those of transformers. In test-all alone: SGLang's, beside vLLM's."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_hpt.config import HttpRewardConfig, RewardConfig
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.engines.vllm.server import ONE_PROCESS
from megatron_hpt.launch.launchers import free_port
from megatron_hpt.rewards.grades import Answer, Cause
from megatron_hpt.rewards.http import RewardServer
from megatron_hpt.rewards.pool import GraderPool
from tests.engine_servers import Server, engine_config, skip_without

pytestmark = pytest.mark.slow
ANSWERS = [Answer(f"{n}+1={n + 1}", str(n + 1), prompt=f"{n}+1=?") for n in range(9)]


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one output in place of a vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=tokenizer.eos_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(reward_model: Path) -> list[float]:
    """The scores by transformers."""
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = LlamaForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(**tokenizer(a.prompt + a.response, return_tensors="pt")).logits.item() for a in ANSWERS]


COMMANDS = {
    "vllm": lambda model: [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--runner", "pooling", "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "64"),
        *ONE_PROCESS,
    ],
    "sglang": lambda model: [
        *("-m", "sglang.launch_server", "--model-path", str(model), "--is-embedding", "--dtype", "float32"),
        *("--device", "cpu", "--disable-cuda-graph", "--disable-radix-cache", "--max-total-tokens", "2048"),
    ],
}


@pytest.fixture(scope="module", params=["vllm", pytest.param("sglang", marks=pytest.mark.thorough)])
def server(request: pytest.FixtureRequest, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kind = request.param
    skip_without(kind)
    config, port, log = engine_config(kind, reward_model), free_port("127.0.0.1"), tmp_path_factory.mktemp(kind) / "log"
    environment = {**ENGINES[kind].environment(config, False), "VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [ENGINES[kind].python(), *COMMANDS[kind](reward_model), "--host", "127.0.0.1", "--port", str(port)]
    started = Server.of_command(command, environment, config, port, log)
    try:
        yield started.ready()
    finally:
        started.stop()


def settings(server: Server, **http: object) -> RewardConfig:
    return RewardConfig(name="http", http=HttpRewardConfig(url=server.url, engine=server.kind, batch=4, **http))


def test_scores_are_those_of_the_model(server: Server, expected: list[float]) -> None:
    """In test-all alone: the other engine."""
    with GraderPool(settings(server)) as pool:
        grades = asyncio.run(pool.grade(ANSWERS))
    assert [grade.score for grade in grades] == pytest.approx(expected, abs=1e-4)


def test_a_threshold_makes_verdicts_of_scores(server: Server, expected: list[float]) -> None:
    """In test-all alone: the other engine."""
    middle = sorted(expected)[len(expected) // 2]
    with GraderPool(settings(server, threshold=middle - 1e-3)) as pool:
        grades = asyncio.run(pool.grade(ANSWERS))
    assert [grade.score for grade in grades] == [float(score >= middle) for score in expected]


def test_what_the_server_refuses_is_ungraded_with_its_words(server: Server) -> None:
    """In test-all alone: the other engine."""
    with GraderPool(settings(server)) as pool:
        (grade,) = asyncio.run(pool.grade([Answer("7" * 500, "7")]))
    assert (grade.score, grade.cause) == (None, Cause.ERROR)
    assert "400" in grade.detail


def test_a_server_that_is_not_there_leaves_answers_ungraded() -> None:
    gone = RewardConfig(name="http", http=HttpRewardConfig(url=f"http://127.0.0.1:{free_port('127.0.0.1')}"))
    grades = asyncio.run(RewardServer(gone).grade(ANSWERS))
    assert {grade.cause for grade in grades} == {Cause.ERROR}
    assert "Cannot connect" in grades[0].detail
