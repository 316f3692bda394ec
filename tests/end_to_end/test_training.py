"""The real thing: vLLM, Megatron ranks, weight transfer, grading, gate, report, export, resume."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Source
from megatron_hpt.evaluation.samples import SampleRow, read_record, read_samples
from megatron_hpt.examples import arithmetic, tiny_llama
from tests.engine_servers import skip_without

from .conftest import OnShared
from .evaluations import Evaluation, stock_server
from .runs import RECIPE, ROOT, SMALL, Run

pytestmark = pytest.mark.slow
STEPS = 4
# A frozen reference and an adaptive coefficient are state that a resumed run must have again.
AROUND = ("algorithm.kl.coefficient=0.01", "algorithm.entropy={coefficient: 0.01, target: 1.0}")
HELD_OUT = "build/quickstart/heldout.parquet"
SELECT = f"evaluation={{sets: {{}}, validation: {{heldout: {HELD_OUT}}}, select: heldout, every: 2, samples: 2}}"
SETTINGS = (f"trainer.steps={STEPS}", "trainer.save_every=2", SELECT, *AROUND, *SMALL)
KEYS = (
    *("step", "rollout/accuracy", "rollout/response_tokens", "gate/sft_share", "train/loss", "train/grad_norm"),
    *("train/entropy", "train/tokens", "mismatch/k3_kl", "weights/version", "time/rollout_s", "time/train_s"),
    *("time/transfer_s", "time/step_s"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a finished run with two tensor parallel ranks."""
    run = Run.start(tmp_path_factory.mktemp("run") / "work", str(RECIPE), *SETTINGS)
    code, text = run.finish()
    assert code == 0, text
    return run.path


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_directory_holds_everything(finished: Path) -> None:
    names = {"config.yaml", "metrics.jsonl", "batches", "checkpoints", "tensorboard", "export", "report.html", "logs"}
    assert names <= {path.name for path in finished.iterdir()}
    logs = {path.name for path in (finished / "logs").iterdir()}
    assert {"engine_0.log", "coordinator.log", "torchrun.log", "trainer_rank0.log", "trainer_rank1.log"} == logs
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step_000002", "step_000004"}


def test_every_step_has_its_metrics_and_the_weights_arrived(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line in lines:
        assert all(line[key] is not None for key in KEYS)
        assert line["weights/version"] == line["step"] + 1
        assert 0 <= line["mismatch/k3_kl"] < 1e-4
        assert line["mismatch/tokens"] > 0
    assert lines[0]["train/kl"] == 0.0  # the actor starts from the reference
    assert lines[-1]["train/kl"] is not None
    assert len({line["train/entropy_coefficient"] for line in lines}) == STEPS
    assert lines[0]["eval/version"] == 0
    assert lines[-1]["eval/version"] == STEPS
    assert [line["step"] for line in lines if "eval/heldout/avg@2" in line] == [0, 2, STEPS - 1]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_every_sample_records_the_version_that_sampled_it(finished: Path) -> None:
    for step in range(STEPS):
        batch = Ledger(finished / "batches").read(step)
        rollouts = [row for row in batch.rows if row.source is Source.ROLLOUT]
        assert {row.policy_version for row in rollouts} == {step}
        assert len(rollouts) + sum(d["cancelled"] for d in batch.decisions) == 8 * 4
        assert len(batch.decisions) == 8
        taught = sum(d["choice"] == "demonstration" for d in batch.decisions)
        assert sum(row.source is Source.DEMONSTRATION for row in batch.rows) == taught


def test_cancelled_rollouts_change_no_weight(finished: Path, on_shared: OnShared, tmp_path: Path) -> None:
    """The gate of this run sends every prompt to its demonstration after one graded answer."""
    assert sum(line["rollout/cancelled"] for line in metrics(finished)) > 0
    run = on_shared.start(tmp_path / "work", *SETTINGS, "rollout.cancel_decided=false")
    code, text = run.finish()
    assert code == 0, text
    assert [line["rollout/cancelled"] for line in metrics(run.path)] == [0] * STEPS
    assert sha256(run.path / "export" / "model.safetensors") == sha256(finished / "export" / "model.safetensors")


def test_the_export_loads_and_generates(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(finished / "export", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    ids = tokenizer("1+2+3\n", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_the_page_has_the_answers_and_may_ask_for_nothing(finished: Path) -> None:
    """What it looks like in a browser: tests/telemetry/test_report.py."""
    page = (finished / "report.html").read_text()
    assert "default-src 'none'" in page
    payload = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    steps = payload["runs"][0]["answers"]["steps"]
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert all(prompt["demonstration"].endswith("<eos>") for prompt in steps[0]["prompts"])
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_resume_trains_the_ledger_again_and_ends_with_the_same_weights(finished: Path, on_shared: OnShared) -> None:
    run = finished.parent / "again-copy"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:06d}")
    shutil.rmtree(run / "export")
    batches = {path.name: path.stat().st_mtime_ns for path in (run / "batches").iterdir()}
    code, text = on_shared.start(finished.parents[1], "--resume", source=run).finish()
    assert code == 0, text
    assert {path.name: path.stat().st_mtime_ns for path in (run / "batches").iterdir()} == batches
    assert sha256(run / "export" / "model.safetensors") == sha256(finished / "export" / "model.safetensors")
    timeless = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/", "weights/bytes"))} for line in metrics(run)
    ]
    expected = [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/", "weights/bytes"))}
        for line in metrics(finished)
    ]
    assert [line["step"] for line in timeless] == list(range(STEPS))
    assert timeless[:-1] == expected[:-1]  # the last evaluation samples again


@pytest.mark.thorough
def test_a_copy_from_the_ledger_needs_no_engine_and_no_data_and_has_the_same_weights(finished: Path, tmp_path: Path) -> None:
    """Adds two ranks, a reference, an adaptive entropy and the absence of the data to the copy of test_lag.py."""
    (tmp_path / "build" / "quickstart").mkdir(parents=True)
    (tmp_path / "build" / "quickstart" / "model").symlink_to(finished.parents[1] / "build" / "quickstart" / "model")
    run = Run.start(tmp_path, "--from-ledger", str(finished), "rollout.python=/nowhere/python")
    code, text = run.finish()
    assert code == 0, text
    assert sha256(run.path / "export" / "model.safetensors") == sha256(finished / "export" / "model.safetensors")
    logs = {path.stem for path in (run.path / "logs").iterdir()}
    assert logs == {"coordinator", "torchrun", "trainer_rank0", "trainer_rank1"}
    trained = [{key: value for key, value in line.items() if key.startswith("train/")} for line in metrics(run.path)]
    assert trained == [{key: value for key, value in line.items() if key.startswith("train/")} for line in metrics(finished)]
    assert not [key for line in metrics(run.path) for key in line if key.startswith("eval/")]


@pytest.mark.thorough
def test_tied_embeddings_arrive_from_two_pipeline_stages(tmp_path: Path) -> None:
    """The engine's tied output layer keeps a copy of its own, packed for the host: it must follow the embedding.

    Adds training to what tests/transfer/test_engines.py pushes from the same layouts into the same kind of engine.
    """
    tiny_llama.write(tmp_path / "model", hidden=64, layers=2, heads=2, kv_heads=1, tied=True)
    arithmetic.write(tmp_path / "data", held_out=8)
    inputs = [f"model.path={tmp_path}/model", f"data.train={tmp_path}/data/train.parquet", "evaluation.sets={}"]
    layout = ["parallel={tensor: 1, pipeline: 2}", "trainer.steps=3", "optimizer.lr=0.01"]
    run = Run.start(tmp_path / "work", str(RECIPE), *SMALL, *inputs, *layout)
    code, text = run.finish()
    assert code == 0, text
    assert all(line["mismatch/k3_kl"] < 1e-9 for line in metrics(run.path))


def assert_overridden_run(run: Path, overrides: dict[str, float]) -> None:
    """Engine, actor, reference, checkpoint and export of a run computed with `overrides`."""
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["overrides"] == overrides
    for line in metrics(run):
        assert line["mismatch/tokens"] > 0
        assert line["mismatch/k3_kl"] < 1e-9
    assert metrics(run)[0]["train/kl"] == pytest.approx(0, abs=1e-9)  # the reference computes as the actor does
    last = max((run / "checkpoints").iterdir())
    for folder in (run / "export", last / "hf", run / "engine_model"):
        config = AutoConfig.from_pretrained(folder)
        assert config.rope_parameters["rope_theta"] == overrides["rope_theta"]
        assert config.max_position_embeddings == overrides["max_position_embeddings"]


def k3_between(model: Path, one: Path, other: Path, tokens: list[int]) -> float:
    """k3 estimate of the KL between what the weights of `model` compute under two folders' configurations."""
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(model, config=AutoConfig.from_pretrained(folder))(
                torch.tensor([tokens])
            ).logits
            for folder in (one, other)
        )
    ratio = second.log_softmax(-1) - first.log_softmax(-1)
    return float((ratio.expm1() - ratio).mean())


def attentive_model(folder: Path) -> None:
    """A tiny model whose attention is far from uniform, so that positions matter."""
    tiny_llama.write(folder, hidden=64, layers=2, heads=2, kv_heads=1, positions=16)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        weights[name] *= 8.0 if "q_proj" in name or "k_proj" in name else 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


ENGINE_SETTINGS = {
    "vllm": ("parallel.tensor=1",),
    # From two ranks, and versions as files of differences: all that a run with this engine is proven by.
    "sglang": ("parallel.tensor=2", "transfer={transport: files, folder: ../versions, full_every: 2}"),
}


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.thorough), "sglang"])
def test_overrides_of_the_model_reach_both_sides_and_the_export(tmp_path: Path, engine: str) -> None:
    """With an engine of the run's own, started from RUN/engine_model. In test-all alone: vLLM, which reads the same folder."""
    skip_without(engine)
    attentive_model(tmp_path / "model")
    arithmetic.write(tmp_path / "data", held_out=8)
    overrides = {"rope_theta": 40, "max_position_embeddings": 128}
    before = (tmp_path / "model" / "config.json").read_bytes()
    inputs = ["model.path=../model", "data.train=../data/train.parquet", "evaluation.sets={}", f"rollout.engine={engine}"]
    settings = ["algorithm.kl.coefficient=0.01", "trainer.steps=3", "optimizer.lr=0.01", *ENGINE_SETTINGS[engine]]
    keys = [f"model.overrides.{key}={value}" for key, value in overrides.items()]
    run = Run.start(tmp_path / "work", str(RECIPE), *SMALL, *inputs, *settings, *keys)
    code, text = run.finish()
    assert code == 0, text
    assert [line["step"] for line in metrics(run.path)] == [0, 1, 2]
    assert_overridden_run(run.path, overrides)
    tokens = Ledger(run.path / "batches").read(0).rows[0].tokens.tolist()
    assert k3_between(tmp_path / "model", tmp_path / "model", run.path / "export", tokens) > 1e-6  # k3_kl could have told
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    versions = {path.name for path in (tmp_path / "versions").glob("*/version_*")}
    assert versions == ({f"version_{v:06d}" for v in range(4)} if engine == "sglang" else set())


def test_a_complete_run_says_so(finished: Path) -> None:
    code, text = Run.start(finished.parents[1], str(finished), "--resume").finish()
    assert code == 1
    assert "is complete (4 steps)" in text


@pytest.mark.thorough
def test_the_sbatch_script_trains_without_slurm(tmp_path: Path, on_shared: OnShared) -> None:
    """Adds the script's way without Slurm to the way with it (tests/slurm) and to its dry run (tests/launch/slurm)."""
    given = {"HPT_RECIPE": str(RECIPE), "HPT_BIN": str(Path(sys.executable).with_name("megatron-hpt"))}
    settings = ("evaluation.sets={}", "trainer.steps=1", "parallel.tensor=1", *SMALL, *on_shared.settings(tmp_path))
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    command = ["bash", str(ROOT / "slurm" / "hpt_smoke.sbatch"), *settings]
    done = subprocess.run(command, cwd=tmp_path, env={**outside, **given}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("hpt-smoke-local-*")
    assert [line["step"] for line in metrics(run)] == [0]


def test_the_best_checkpoint_is_named_and_every_evaluation_keeps_its_samples(finished: Path) -> None:
    values = {line["eval/version"]: line["eval/heldout/avg@2"] for line in metrics(finished) if "eval/version" in line}
    del values[0]  # the model before training has no checkpoint
    best = json.loads((finished / "best.json").read_text())
    assert best["value"] == max(values.values())
    assert best["step"] == min(step for step, value in values.items() if value == best["value"])
    assert (finished / best["checkpoint"]).is_dir()
    for step, value in values.items():
        folder = finished / "evaluations" / f"step_{step:06d}"
        rows = read_samples(folder / "samples" / "heldout.parquet")
        assert len(rows) == 64 * 2
        assert sum(row.score for row in rows) / len(rows) == pytest.approx(value)
        assert read_record(folder).step == step


def test_the_command_samples_what_training_sampled(finished: Path, tmp_path: Path) -> None:
    """The same weights, from Megatron's checkpoint, in an engine of the command's own."""
    evaluation = Evaluation(finished.parents[1], str(finished / "checkpoints" / f"step_{STEPS:06d}"), tmp_path)
    assert "heldout" in evaluation.finish()
    assert evaluation.rows == samples_of_last_step(finished)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "evaluation.json", "samples", "logs"}


@pytest.mark.thorough
def test_a_server_of_the_folder_samples_the_same(finished: Path, tmp_path: Path) -> None:
    """Adds a server as anybody starts it, and a kill, to the engine of the command; evaluation/test_collecting.py continues."""
    work, expected = finished.parents[1], samples_of_last_step(finished)
    server = stock_server(finished / "export", tmp_path)
    try:
        killed = Evaluation(work, server.ready().url, tmp_path / "out", "rollout.max_running=4")
        assert 8 <= killed.kill_after(8) < len(expected)
        evaluation = Evaluation(work, server.url, tmp_path / "out")
        evaluation.finish()
        assert evaluation.rows == expected
    finally:
        server.stop()


def samples_of_last_step(run: Path) -> list[SampleRow]:
    return read_samples(run / "evaluations" / f"step_{STEPS:06d}" / "samples" / "heldout.parquet")
