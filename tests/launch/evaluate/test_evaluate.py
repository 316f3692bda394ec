"""What `megatron-hpt evaluate` refuses before an engine starts, and what needs none."""

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_hpt.comparison.summary import table
from megatron_hpt.config import Config, DataConfig, ModelConfig, ParallelConfig, RewardConfig
from megatron_hpt.data.parquet import Problem, write_problems
from megatron_hpt.errors import CheckpointError, ConfigError, EngineError, HptError, ModelError
from megatron_hpt.evaluation.collecting import Collection
from megatron_hpt.evaluation.samples import SampleRow, read_samples, samples_file, write_record, write_samples
from megatron_hpt.launch.evaluate.command import evaluate, regrade, summaries
from megatron_hpt.launch.evaluate.request import EvaluationOptions, prepare
from megatron_hpt.launch.evaluate.subject import resolve
from megatron_hpt.models.checkpoints import Best, write_best
from megatron_hpt.models.conversion import ToMegatron
from megatron_hpt.run import create


@pytest.fixture
def options(arithmetic_data: Path, tmp_path: Path) -> EvaluationOptions:
    return EvaluationOptions(data=arithmetic_data, out=tmp_path / "out", max_tokens=24)


@pytest.fixture
def without_tokenizer(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


def test_a_model_that_is_none_is_told_what_one_is(options: EvaluationOptions, without_tokenizer: Path, tmp_path: Path) -> None:
    for model, error, message in (
        (tmp_path / "nothing", ModelError, "no such folder; give a Hugging Face folder, a checkpoint, a run directory"),
        (tmp_path, ModelError, r"has no config\.json and is no checkpoint"),
        (without_tokenizer, ModelError, r"has no tokenizer \(tokenizer\.json\)"),
        ("http://127.0.0.1:9", EngineError, "127.0.0.1:9 cannot be reached"),
    ):
        with pytest.raises(error, match=message):
            prepare(str(model), ["heldout"], options)
    assert not options.out.exists()


def test_what_does_not_fit_into_the_context_is_told_before_anything_starts(
    tiny_model: Path, options: EvaluationOptions
) -> None:
    with pytest.raises(
        ConfigError, match=r"heldout, problem arithmetic-heldout-\d+: a prompt of 6 tokens and --max-tokens 59 .*"
    ):
        prepare(str(tiny_model), ["heldout"], replace(options, max_tokens=59))
    prepare(str(tiny_model), ["heldout"], replace(options, max_tokens=58))
    wider = replace(options, max_tokens=59, overrides=["model.overrides.max_position_embeddings=65"])
    assert prepare(str(tiny_model), ["heldout"], wider).config.model.overrides == {"max_position_embeddings": 65}


def test_a_prompt_beyond_the_context_is_named(tiny_model: Path, options: EvaluationOptions, tmp_path: Path) -> None:
    write_problems(tmp_path / "long.parquet", [Problem("1+" * 40 + "1", "41", None)], "long", "test")
    with pytest.raises(ConfigError, match=r"problem long-test-0: a prompt of 82 tokens .* context of 64; no response fits"):
        prepare(str(tiny_model), [str(tmp_path / "long.parquet")], options)


def test_an_unknown_grader_or_setting_is_refused(tiny_model: Path, options: EvaluationOptions) -> None:
    with pytest.raises(ConfigError, match="given 'maths'"):
        prepare(str(tiny_model), ["heldout"], replace(options, grader="maths"))
    with pytest.raises(ConfigError, match=r"rollout\.engin: unknown key"):
        prepare(str(tiny_model), ["heldout"], replace(options, overrides=["rollout.engin=vllm"]))
    with pytest.raises(ConfigError, match=r"--system-prompt: given 'simpelrl'; allowed: simplerl, .*did you mean 'simplerl'"):
        prepare(str(tiny_model), ["heldout"], replace(options, system_prompt="simpelrl"))


def test_the_parts_of_a_run(tiny_model: Path, arithmetic_data: Path, tmp_path: Path) -> None:
    """Its best checkpoint, else its export, else its newest checkpoint; with the run's settings, wherever it is named."""
    data = DataConfig(train="t", chat_template="{{ messages[-1]['content'] }}")
    run = create(Config(name="x", model=ModelConfig(path="gone", overrides={"rope_theta": 5}), data=data), tmp_path)
    with pytest.raises(ModelError, match="neither a checkpoint nor an export yet"):
        resolve(str(run.path))
    for step in (10, 20):
        ToMegatron(tiny_model, ParallelConfig(), None).write(run.checkpoint(step))
    assert resolve(str(run.path)).path == run.checkpoint(20)
    shutil.copytree(tiny_model, run.export)
    assert resolve(str(run.path)).path == run.export
    write_best(run.path, Best(10, "mine", "eval/mine/avg@4", 0.5))
    assert resolve(str(run.path)).path == run.checkpoint(10)
    options = EvaluationOptions(data=arithmetic_data, max_tokens=24)
    job = prepare(str(run.checkpoint(20)), ["heldout"], options)
    assert job.record.protocol.chat_template == data.chat_template
    assert (job.config.model.path, job.config.model.overrides) == (str(run.checkpoint(20)), {})
    assert str(job.folder) == f"evaluations/{run.path.name}-step_000020"
    part = next(run.checkpoint(20).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, \d+ were written"):
        resolve(str(run.checkpoint(20)))


def sampled(model: Path, options: EvaluationOptions) -> Path:
    """An evaluation whose samples are all there, as if the engine had boxed the sum, one more, or nothing."""
    job = prepare(str(model), ["heldout@4"], options)
    options.out.mkdir()
    write_record(options.out, job.record)
    with Collection(options.out, job.record, job.sets) as collection:
        for one in collection.missing:
            truth, p = one.problem.ground_truth, one.problem
            response = (f"\\boxed{{{truth}}}", f"\\boxed{{{int(truth) + 1}}}", "", f"\\boxed{{{truth}.0}}")[one.sample]
            answer = response[7:-1] or None
            row = SampleRow(
                p.problem_id, one.sample, one.seed, p.data_source, None, p.prompt, response, truth, answer, 4, False
            )
            collection._journals["heldout"].add(row)
    return options.out


def test_what_is_sampled_needs_no_engine(tiny_model: Path, options: EvaluationOptions) -> None:
    """An evaluation killed before its last grading goes on without one, and is graded again without one."""
    folder = sampled(tiny_model, options)
    console = Console(file=io.StringIO(), width=200)
    assert evaluate(str(tiny_model), ["heldout@4"], options, console) == folder
    (found,) = summaries(folder).values()
    assert (found.average.value, found.problems, found.k, found.ungraded) == (0.5, 16, 4, 0)
    assert {k: round(e.value, 6) for k, e in found.passed.items()} == {1: 0.5, 2: round(5 / 6, 6), 4: 1.0}
    assert found.majority[4].value == 1.0
    console.print(table({"heldout": found}, {}))
    assert "heldout          16  4  50.0 (" in console.file.getvalue()
    with pytest.raises(ConfigError, match=r"holds another evaluation: temperature was 0\.6, now 1\.0\. Give another folder"):
        evaluate(str(tiny_model), ["heldout@4"], replace(options, temperature=1.0), console)
    with pytest.raises(ConfigError, match="heldout: 4 samples a problem are there, 2 are asked for"):
        evaluate(str(tiny_model), ["heldout@2"], options, console)


@pytest.mark.slow
def test_grading_again_changes_scores_alone(tiny_model: Path, options: EvaluationOptions) -> None:
    folder = sampled(tiny_model, options)
    evaluate(str(tiny_model), ["heldout@4"], options, Console(file=io.StringIO()))
    before = read_samples(samples_file(folder, "heldout"))
    tampered = [replace(row, score=None, ungraded_reason="crash") for row in before]
    write_samples(samples_file(folder, "heldout"), tampered)
    assert summaries(folder)["heldout"].average is None
    regrade(folder, None, RewardConfig())
    assert read_samples(samples_file(folder, "heldout")) == before
    with pytest.raises(HptError, match="given 'nothing'"):
        regrade(folder, "nothing", RewardConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows[:5], *rows[6:]], "problem '.*', sample 1 is missing; restore the file"),
        (lambda rows: [*rows, rows[3]], "problem '.*', sample 3 is there 2 times; restore"),
        (lambda rows: rows[4:], "it has 15 problems, and 16 were asked; restore"),
        (
            lambda rows: [replace(rows[0], sample=7), *rows[1:]],
            "sample 0 is missing; problem '.*', sample 7 is not one of its 4",
        ),
        (lambda rows: rows[::4], r"is missing; .*and 43 more; restore"),
    ],
)
def test_samples_that_are_not_those_that_were_written_are_neither_graded_nor_shown(
    tiny_model: Path, options: EvaluationOptions, change: Callable, message: str
) -> None:
    folder = sampled(tiny_model, options)
    evaluate(str(tiny_model), ["heldout@4"], options, Console(file=io.StringIO()))
    file = samples_file(folder, "heldout")
    write_samples(file, change(read_samples(file)))
    before = file.read_bytes()
    with pytest.raises(HptError, match=message):
        regrade(folder, "choice", RewardConfig())
    assert file.read_bytes() == before
    with pytest.raises(HptError, match=message):
        summaries(folder)
