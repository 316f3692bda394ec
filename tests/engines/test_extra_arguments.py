"""Arguments that users add to an engine's command line: which are refused before anything starts, and in what words."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_hpt.engines import extra_arguments
from megatron_hpt.engines.registry import ENGINES
from megatron_hpt.errors import ConfigError
from megatron_hpt.launch import engine_arguments, train
from megatron_hpt.launch.engine_arguments import check_engine_arguments, check_extra_arguments
from megatron_hpt.overrides import apply_overrides, dump_yaml, load_yaml

OWN = ["python", "-m", "server", "--max-model-len", "64", "--no-enable-chunked-prefill", "--hf-overrides={}", "--enforce-eager"]
REFUSING = "import sys; sys.exit('server: error: unrecognized arguments: ' + ' '.join(sys.argv[-2:]))"


def config(*given: str, engine: str = "vllm", model: str = "m") -> Config:
    rollout = RolloutConfig(engine=engine, extra_arguments=list(given))
    return Config(name="x", model=ModelConfig(path=model), data=DataConfig(train="t"), rollout=rollout)


@pytest.mark.parametrize(
    "given",
    [
        ["--max-model-len", "100000"],
        ["--max-model-len=100000"],
        ["--max_model_len", "100000"],
        ["--max-model", "100000"],
        ["--kv-cache-dtype", "fp8", "--enable-chunked-prefill"],
        ["--hf-overrides.rope_theta", "1"],
        ["--no-enforce-eager"],
        ["-tp", "2"],
    ],
)
def test_what_the_run_sets_cannot_be_given_in_any_form(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.extra_arguments: --?[a-z-]+ cannot be given: .*; leave it out$"):
        extra_arguments.check(given, OWN, {"-tp": "rollout.tensor_parallel sets it"})


def test_what_the_run_leaves_to_the_engine_can_be_given() -> None:
    given = ["--kv-cache-dtype", "fp8", "--max-model-length-of-something", "-1", "--speculative-config", '{"method": "ngram"}']
    extra_arguments.check(given, OWN, {})
    extra_arguments.check([], OWN, {})


@pytest.mark.parametrize(
    ("engine", "given", "why"),
    [
        ("vllm", "--enable-expert-parallel", "weights are sent to tensor parallel ranks alone"),
        ("sglang", "--quantization", "SGLang replaces weights that it has quantised by others without a loader"),
        ("sglang", "--tensor-parallel-size", r"rollout\.tensor_parallel sets it"),
    ],
)
def test_what_a_run_cannot_follow_is_refused_with_the_reason(tiny_model: Path, engine: str, given: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{given} cannot be given: {why}"):
        check_engine_arguments(config(given, engine=engine, model=str(tiny_model)))


def test_a_number_need_not_be_quoted(tmp_path: Path) -> None:
    given = """rollout.extra_arguments=[--swap-space, 3, --speculative-config, '{"method": "ngram"}']"""
    changed = apply_overrides(config(), [given])
    assert changed.rollout.extra_arguments == ["--swap-space", "3", "--speculative-config", '{"method": "ngram"}']
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(changed))
    assert load_yaml(file) == changed


def test_they_are_of_servers_that_are_started() -> None:
    with pytest.raises(ValueError, match="those of urls run already"):
        RolloutConfig(urls=["http://a:1"], extra_arguments=["--x"])


def test_the_engine_is_asked_before_anything_is_started(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setitem(ENGINES, "vllm", replace(ENGINES["vllm"], argument_check=REFUSING))
    check_extra_arguments(config(model=str(tiny_model)))  # nothing of the user's: the engine is not asked
    with pytest.raises(
        ConfigError, match=r"^vllm refuses its arguments:\n  server: error: unrecognized arguments: --no-such 3$"
    ):
        check_extra_arguments(config("--no-such", "3", model=str(tiny_model)))


def test_an_engine_that_takes_none_says_so(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    deaf = replace(ENGINES["vllm"], command=lambda config, python, start: [python, "-m", "server", "x"], argument_check="")
    monkeypatch.setitem(ENGINES, "vllm", deaf)
    with pytest.raises(ConfigError, match=r"the command line of rollout\.engine=vllm takes none"):
        check_engine_arguments(config("--x", model=str(tiny_model)))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("usage: …\n-c: error: unrecognized arguments: --no-such\n", ["-c: error: unrecognized arguments: --no-such"]),
        (
            "Traceback …\n  File …\npydantic.ValidationError: 1 problem\n  it is this\n",
            ["pydantic.ValidationError: 1 problem", "  it is this"],
        ),
    ],
)
def test_what_the_engine_said_last_is_told(said: str, told: list[str]) -> None:
    assert engine_arguments._last_error(said) == told


@pytest.mark.parametrize("gpus", [(), ("0", "1")])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_stores_whether_seeds_are_heeded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: tuple[str, ...], resumed: bool
) -> None:
    """Its command line is looked at before there is a run, and its clients read what was decided."""
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from megatron_hpt.config import Config, DataConfig, ModelConfig, RolloutConfig\n"
        "def recipe():\n"
        "    rollout = RolloutConfig(extra_arguments=['--x'])\n"
        "    return Config(name='x', model=ModelConfig(path='m'), data=DataConfig(train='t'), rollout=rollout)\n"
    )
    looked_at, runs = [], tmp_path / "runs"
    monkeypatch.setattr(train, "gpus_here", lambda: gpus)
    monkeypatch.setattr(train.preflight, "check", lambda config: None)
    monkeypatch.setattr(train, "check_extra_arguments", lambda config: looked_at.append(config.rollout.seeded))
    monkeypatch.setattr(train, "files", lambda config: [])
    monkeypatch.setattr(train, "check_same_files", lambda files, config: None)
    supervised = []
    monkeypatch.setattr(train, "_supervise", lambda config, run, *rest: supervised.append((config, run)))
    run = train.start_run(str(recipe), [], runs, lambda config: lambda run: None)
    if resumed:
        train.resume_run(str(run.path), [], runs, lambda config: lambda run: None)
    assert {(*looked_at, config.rollout.seeded) for config, _ in supervised} == {((not gpus,) * (2 + resumed))}
    assert re.search(r"seeded: (\w+)", run.config.read_text())[1] == str(not gpus).lower()
