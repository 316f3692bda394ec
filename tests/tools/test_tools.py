"""The command-line tools, run as a user runs them."""

import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_hpt.data.prompts import LengthLimits, load_prompts
from megatron_hpt.examples import smollm2
from megatron_hpt.rewards.reference import grade
from tests import programs

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments: object, ok: bool = True) -> str:
    done = programs.tool(name, *arguments)
    assert (done.returncode == 0) is ok, done.stderr
    return done.stdout + done.stderr


def answers_are_correct(path: Path) -> None:
    for row in pq.read_table(path).to_pylist():
        assert grade(row["target"][0]["content"], row["reward_model"]["ground_truth"]) == 1.0, row


@pytest.mark.parametrize("arguments", [("arithmetic", "--held-out", 30), ("word-problems", "--train", 40, "--held-out", 10)])
def test_prepared_demonstrations_earn_the_reward_and_sets_do_not_overlap(tmp_path: Path, arguments: tuple, tokenizer) -> None:
    command, *options = arguments
    tool("prepare_data.py", command, tmp_path, *options)
    sets = {}
    for name in ("train", "heldout"):
        answers_are_correct(tmp_path / f"{name}.parquet")
        prompts = load_prompts(str(tmp_path / f"{name}.parquet"), tokenizer, LengthLimits(10_000, 10_000))
        sets[name] = {tuple(prompt.tokens) for prompt in prompts}
    assert not sets["train"] & sets["heldout"]
    assert len(sets["heldout"]) == options[-1]


@pytest.mark.slow
def test_smollm2_is_converted_into_a_model_that_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2.write(tmp_path / "smollm2", smollm2.shipped_file())
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    chat = [{"role": "user", "content": "What is 7+5?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "12" in tokenizer.decode(answer)


def test_the_sbatch_script_says_what_is_missing(tmp_path: Path) -> None:
    environment = {**os.environ, "HPT_BIN": str(tmp_path / "nothing")}
    script = str(ROOT / "slurm" / "hpt_smoke.sbatch")
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not found: run 'make .venv/.ready'" in done.stderr
