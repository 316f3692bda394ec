"""An engine that the package knows nothing of: a recipe names it, and a step is trained with its answers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.data.parquet import write_problems
from megatron_hpt.data.prompts import LengthLimits, Prompt, load_prompts
from megatron_hpt.examples import arithmetic
from tests.engines.recorded_engine import RECORD

from .runs import RECIPE, ROOT, Run
from .test_training import metrics

pytestmark = pytest.mark.slow
PROMPTS, SAMPLES = 4, 4


@torch.no_grad()
def record(model: Path, prompts: list[Prompt]) -> None:
    """Write two answers for every prompt, one right and one wrong, with their log-probabilities by Hugging Face's model."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = {}
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        recorded = []
        for tokens in (prompt.demonstration, other.demonstration):
            logits = network(torch.tensor([prompt.tokens + tokens])).logits[0, len(prompt.tokens) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            recorded.append((tokens, logprobs.tolist()))
        answers[json.dumps(prompt.tokens)] = recorded
    (model / RECORD).write_text(json.dumps(answers))


def test_an_engine_from_outside_the_package_trains_a_step(tiny_model: Path, tokenizer, tmp_path: Path) -> None:
    """Launcher, coordinator, trainer and supervisor as always; nothing but `rollout.engine` names the engine."""
    model, data = tmp_path / "model", tmp_path / "train.parquet"
    shutil.copytree(tiny_model, model)
    write_problems(data, [arithmetic.problem((n, n + 1, n + 2)) for n in range(1, 1 + PROMPTS)], "arithmetic", "train")
    record(model, load_prompts(str(data), tokenizer, LengthLimits(8, 24)))
    run = Run.start(
        tmp_path / "work",
        *(str(RECIPE), f"rollout.engine={ROOT}/tests/engines/recorded_engine.py:RECORDED"),
        *(f"model.path={model}", f"data.train={data}", "algorithm.name=grpo", "evaluation.sets={}", "trainer.export=false"),
        *(f"trainer.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}", "trainer.steps=1"),
        *("parallel.tensor=1", "optimizer.warmup_steps=0"),
    )
    code, text = run.finish()
    assert code == 0, text
    (line,) = metrics(run.path)
    assert 0 < line["rollout/accuracy"] < 1
    assert line["train/grad_norm"] > 0
    assert line["weights/version"] == 1
    assert line["mismatch/tokens"] > 0
    assert 0 <= line["mismatch/k3_kl"] < 1e-4  # the trainer computes what was recorded
    rows = Ledger(run.path / "batches").read(0).rows
    assert len(rows) == PROMPTS * SAMPLES
    assert {row.policy_version for row in rows} == {0}
    log = (run.path / "logs" / "engine_0.log").read_text().splitlines()
    told = [entry.removeprefix("told: ") for entry in log if entry.startswith("told: ")]
    assert told == ["prepare", "pause", "version 0", "resume", "pause", "version 1", "resume"]
