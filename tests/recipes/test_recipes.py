"""The paper's recipes in full size, every method in every layout: what can be checked without weights and hardware."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from megatron_hpt import recipe
from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError
from megatron_hpt.examples.paper import LayoutName, Method
from megatron_hpt.models.hf_config import ModelShape, model_shape
from megatron_hpt.models.mapping import hf_tensor_shapes
from megatron_hpt.models.tokenizer import load_tokenizer
from megatron_hpt.objective import algorithms
from megatron_hpt.objective.algorithms import of_run, without_effect
from megatron_hpt.objective.roles import Role
from megatron_hpt.objective.tokens import Counts
from megatron_hpt.overrides import dump_yaml, load_yaml
from megatron_hpt.plan.assumptions import Assumptions
from megatron_hpt.plan.layout import check_layout, check_lengths
from megatron_hpt.plan.plan import of_recipe
from megatron_hpt.rewards import registry

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "qwen2_5_math.py": {"size=7B": ("one_node", "cluster"), "size=1.5B": ("one_node", "one_gpu", "cluster")},
    "llama_3_1.py": {"size=8B": ("one_node", "cluster"), "size=70B": ("cluster",)},
    "qwen2_5.py": {"": ("cluster",)},
    "qwen3_moe.py": {"": ("cluster", "one_node")},
}
"""Recipe → size → layouts, the default first."""
PARAMETERS = {
    "Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen2.5-Math-7B": 7_615_616_512,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-235B-A22B": 235_093_634_560,
}
"""As published with the weights."""
CLUSTERS = {"one_gpu": "h100x1", "one_node": "h100x8", "cluster": "h100x128"}
LARGER = {("qwen3_moe.py", "one_node"): "h200x8"}
"""Layouts that need other GPUs, as their recipes say."""
RUNS = [
    (file, size, method, layout)
    for file, sizes in LAYOUTS.items()
    for size, layouts in sizes.items()
    for method, layout in itertools.product(get_args(Method), layouts)
]


def load(file: str, *given: str) -> Config:
    return recipe.load(str(ROOT / "recipes" / file), [text for text in given if text]).config


def published(config: Config) -> ModelShape:
    return model_shape(ROOT / "docs" / config.model.path, config.model.overrides)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")  # where models/<name>/config.json is


@pytest.mark.parametrize(("file", "size", "method", "layout"), RUNS)
def test_every_run_is_valid_in_full_size(file: str, size: str, method: str, layout: str, tmp_path: Path) -> None:
    config = load(file, size, f"method={method}", f"layout={layout}")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(tmp_path / "config.yaml") == config
    algorithm, shape = of_run(config), published(config)
    assert config.algorithm.name == method
    algorithms.check(config, algorithm)
    check_layout(config, shape)
    check_lengths(config, shape)
    registry.check(config.reward)
    assert without_effect(config) == []


@pytest.mark.parametrize(("file", "size", "method", "layout"), RUNS)
def test_every_run_fits_its_hardware_by_the_plans_arithmetic(file: str, size: str, method: str, layout: str) -> None:
    cluster = ROOT / "recipes/clusters" / f"{LARGER.get((file, layout), CLUSTERS[layout])}.yaml"
    given = [text for text in (size, f"method={method}", f"layout={layout}") if text]
    of_recipe(str(ROOT / "recipes" / file), given, Assumptions(cluster)).require_fit()


@pytest.mark.parametrize(("file", "size", "layout"), sorted({run[:2] + run[3:] for run in RUNS if run[3] != "cluster"}))
def test_engines_on_the_trainers_gpus_sleep_and_leave_what_was_not_measured(file: str, size: str, layout: str) -> None:
    """At least 4 GiB of every GPU, beside the allowances of the plan."""
    cluster = ROOT / "recipes/clusters" / f"{LARGER.get((file, layout), CLUSTERS[layout])}.yaml"
    found = of_recipe(str(ROOT / "recipes" / file), [text for text in (size, f"layout={layout}") if text], Assumptions(cluster))
    assert found.config.rollout.sleep
    assert found.config.rollout.gpu_memory_share < found.largest_share
    assert max(moment.total for moment in found.moments) < (found.cluster.gpu.memory_gib - 4) * 2**30


def test_eight_h100_do_not_hold_the_mixture_of_experts() -> None:
    h100 = Assumptions(ROOT / "recipes/clusters/h100x8.yaml")
    found = of_recipe(str(ROOT / "recipes/qwen3_moe.py"), ["layout=one_node"], h100)
    with pytest.raises(ConfigError, match="a trainer rank needs"):
        found.require_fit()


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_the_published_sizes_give_the_published_parameters(name: str, parameters: int) -> None:
    assert sum(math.prod(shape) for shape in hf_tensor_shapes(model_shape(ROOT / "docs/models" / name)).values()) == parameters


@pytest.mark.parametrize(("file", "size"), [(file, size) for file, sizes in LAYOUTS.items() for size in sizes])
def test_the_first_layout_is_the_default_and_what_does_not_fit_is_refused(file: str, size: str) -> None:
    layouts = LAYOUTS[file][size]
    assert load(file, size) == load(file, size, "method=hpt", f"layout={layouts[0]}")
    for layout in set(get_args(LayoutName)) - set(layouts):
        with pytest.raises(ConfigError, match=f"layout: given '{layout}'; .* has {', '.join(layouts)}"):
            load(file, size, f"layout={layout}")


def numbers(config: Config) -> dict[str, Any]:
    optimizer, algorithm, trainer = config.optimizer, config.algorithm, config.trainer
    return {
        "lr": optimizer.lr,
        "skip": optimizer.skip_above,
        "threshold": algorithm.gate.threshold,
        "sft": algorithm.demonstration_coefficient,
        "entropy": algorithm.entropy.coefficient,
        "steps": trainer.steps,
        "prompts": trainer.prompts_per_step,
    }


HPT = {"lr": 5e-6, "skip": 80, "threshold": 0, "sft": 1, "entropy": 1e-3, "steps": 500, "prompts": 128}


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        ("qwen2_5_math.py", ("size=7B",), HPT),
        ("qwen2_5_math.py", ("size=7B", "method=hpt_reference"), HPT),
        ("qwen2_5_math.py", ("size=1.5B",), {**HPT, "sft": 0.3}),
        ("llama_3_1.py", ("size=8B",), {**HPT, "threshold": 2, "skip": None}),
        ("qwen2_5_math.py", ("method=luffy",), {**HPT, "lr": 1e-6, "skip": None}),
        ("qwen2_5_math.py", ("method=srft",), {**HPT, "lr": 1e-6, "skip": None}),
        ("qwen2_5_math.py", ("method=sft",), {**HPT, "lr": 5e-5, "skip": None, "entropy": 0, "steps": 2156, "prompts": 64}),
    ],
)
def test_the_numbers_are_those_of_the_scripts(file: str, given: tuple[str, ...], expected: dict) -> None:
    config = load(file, *given)
    assert numbers(config) == expected
    assert (config.data.max_prompt_length, config.data.max_response_length) == (1024, 8192)
    assert (config.rollout.samples_per_prompt, config.rollout.temperature) == (8, 1.0)
    assert (config.optimizer.betas, config.optimizer.weight_decay, config.optimizer.clip_grad) == ((0.9, 0.999), 0.01, 1.0)
    assert (config.evaluation.temperature, config.evaluation.top_p, config.evaluation.every) == (0.6, 0.95, 10)


def test_qwen_has_the_papers_positions_and_is_too_short_without_them() -> None:
    config = load("qwen2_5_math.py")
    assert (published(config).rope_theta, published(config).max_positions) == (40000, 16384)
    config.model.overrides = {}
    with pytest.raises(ConfigError, match=r"given 9216; the model has 4096 positions"):
        check_lengths(config, published(config))


def test_llama_is_asked_in_the_papers_words(tiny_model: Path) -> None:
    config = load("llama_3_1.py", f"model.path={tiny_model}")
    chat = [{"role": "user", "content": "What is $1+1$?"}]
    text = load_tokenizer(config).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "Question:\nWhat is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}.\nAnswer:\n"
        "Let's think step by step."
    )


def test_the_70b_has_the_ranks_of_seven_nodes_and_engines_of_nine() -> None:
    config = load("llama_3_1.py", "size=70B")
    assert config.parallel.ranks == 7 * 8
    assert config.rollout.servers * config.rollout.tensor_parallel == 9 * 8


def test_only_models_without_published_runs_sample_from_older_weights() -> None:
    lags = {load(file, size).name: load(file, size).rollout.max_lag for file, sizes in LAYOUTS.items() for size in sizes}
    assert {name for name, lag in lags.items() if lag} == {
        *(f"{model}-hpt-cluster" for model in ("Llama-3.1-70B", "Qwen2.5-72B", "Qwen3-30B-A3B"))
    }
    assert not any(load("qwen2_5_math.py", "layout=cluster", size).rollout.max_lag for size in ("size=7B", "size=1.5B"))


def test_hpt_reference_has_the_papers_micro_batches_where_the_paper_has_the_model() -> None:
    for size, layout in (("7B", "one_node"), ("7B", "cluster"), ("1.5B", "one_gpu")):
        config = load("qwen2_5_math.py", f"size={size}", f"layout={layout}", "method=hpt_reference")
        assert config.actor.micro_batch_tokens == 32_768


@pytest.mark.parametrize("ranks", [4, 8])
def test_how_hpt_and_hpt_reference_weigh_demonstrations_and_the_bonus(ranks: int) -> None:
    """The ratios of docs/recipes.md, of 32 prompts of 128 taught by demonstrations and 32 micro-batches over all ranks."""
    taught, batches, length, samples = 32, 32, 100, 8

    def counts(rows: int, role: Role) -> Counts:
        share = {Role.DEMONSTRATION: taught, Role.ROLLOUT: 128 - taught}[role] / 128
        return Counts(tokens=rows * length, rows=rows, ranks=ranks, prompt_share=share)

    def weight(aggregation: Any, rows: int, role: Role) -> float:
        """Of one token; a micro-batch holds an equal part of the rows."""
        tokens = torch.zeros(rows * length // batches)
        stream = SimpleNamespace(logprobs=tokens, weights=tokens + 1, row_lengths=tokens + length)
        return float(aggregation(stream, tokens == 0, counts(rows, role))[0])

    def ratios(name: str) -> tuple[float, float]:
        algorithm = of_run(load("qwen2_5_math.py", f"method={name}"))
        rollouts, demonstrations = (term.aggregation for term in algorithm.terms)
        rollout = weight(rollouts, (128 - taught) * samples, Role.ROLLOUT)
        taught_by = weight(demonstrations, taught, Role.DEMONSTRATION)
        return taught_by / rollout, weight(algorithm.entropy_aggregation, 128, Role.ROLLOUT) / rollout

    found = [ours / theirs for ours, theirs in zip(ratios("hpt"), ratios("hpt_reference"), strict=True)]
    assert found == pytest.approx([8 * taught / batches, 1024 / batches])
