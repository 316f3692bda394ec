"""`megatron-hpt plan` through the command line: what it shows, what it refuses, and the layouts that it answers with."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.config import Config
from megatron_hpt.errors import ConfigError, HptError, ModelError
from megatron_hpt.models.published import PUBLISHED, folder_of
from megatron_hpt.overrides import apply_overrides, dump_yaml
from megatron_hpt.plan.assumptions import DEFAULT_CLUSTER, Assumptions
from megatron_hpt.plan.cluster import load_cluster
from megatron_hpt.plan.plan import make, of_recipe
from megatron_hpt.plan.rollouts.lengths import of_fill
from tests import programs

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("model.path=models/Llama-3.1-70B", "model.dtype=bfloat16", "transfer.transport=nccl"),
    *("data.max_prompt_length=1024", "data.max_response_length=7168", "actor.recompute=full"),
    *("parallel.tensor=8", "parallel.pipeline=4", "parallel.data=3", "parallel.sequence=true"),
    *("rollout.tensor_parallel=8", "rollout.servers=4"),
)
NEAREST = "the nearest layout that fits:"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    config = Config(name="seventy", model={"path": "x"}, data={"train": "none.parquet"})
    (tmp_path / "config.yaml").write_text(dump_yaml(apply_overrides(config, list(SETTINGS))))
    return str(tmp_path / "config.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return programs.megatron_hpt("plan", *arguments)


def test_a_recipe_that_fits_is_shown(recipe: str) -> None:
    command = [sys.executable, "-m", "megatron_hpt.cli", "plan", recipe, "--cluster", str(DEFAULT_CLUSTER)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text in ("16 × 8", "0 to 11", "12 to 15", "70.55 · 10^9", "docs/models/Llama-3.1-70B/config.json", "fits"):
        assert text in done.stdout


def test_no_torch_is_imported(recipe: str) -> None:
    code = (
        "import sys; from megatron_hpt import cli\n"
        f"sys.argv = ['megatron-hpt', 'plan', {recipe!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "found = {'torch', 'megatron', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_shown_and_refused_with_what_does(recipe: str) -> None:
    done = run(recipe, "parallel.pipeline=1", "parallel.data=1", "actor.recompute=none", "rollout.servers=1")
    assert done.returncode == 1
    assert "memory of the fullest ranks" in done.stdout
    assert "generation s" not in done.stdout
    assert "error: a trainer rank needs" in done.stderr
    answer = done.stderr.split("the nearest layout that fits: ")[1].split()
    again = run(recipe, "parallel.pipeline=1", "parallel.data=1", "actor.recompute=none", "rollout.servers=1", *answer)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "parallel.tensor=5",
            rf"parallel\.tensor: given 5, .*allowed: 1, 2, 4, 8.*\n{NEAREST} parallel\.tensor=4",
        ),
        ("parallel.pipeline=7", rf"parallel\.pipeline: given 7, .* 80 layers.*\n{NEAREST} parallel\.pipeline=4"),
        ("parallel.data=40", rf"h100x128 has 16 nodes .*\n{NEAREST} parallel\.data=3"),
        ("rollout.tensor_parallel=16", rf"rollout\.tensor_parallel: given 16; .*\n{NEAREST} rollout\.tensor_parallel=8"),
        ("rollout.tensor_parallel=1", rf"room for 0 tokens .* after 131\.\d GiB .*\n{NEAREST} rollout\.tensor_parallel=2"),
        ("data.max_response_length=200000", r"given 201024; the model has 131072 positions"),
        ("model.path=models/Llama-3.1-9B", r"docs/models/ has none under llama-3\.1-9b; .*did you mean 'llama-3\.1-8b'"),
    ],
)
def test_a_refusal_names_the_nearest_that_runs(recipe: str, change: str, message: str) -> None:
    with pytest.raises(HptError, match=message):
        of_recipe(recipe, [change], Assumptions(DEFAULT_CLUSTER)).require_fit()


@settings(max_examples=25)
@given(
    name=st.sampled_from(("Llama-3.1-8B", "Qwen2.5-72B", "Qwen3-30B-A3B", "Llama-3.1-70B")),
    tensor=st.sampled_from((1, 2, 3, 8)),
    pipeline=st.sampled_from((1, 3, 4)),
    data=st.integers(1, 12),
    recompute=st.sampled_from(("none", "full")),
)
def test_the_nearest_layout_really_fits(name: str, tensor: int, pipeline: int, data: int, recompute: str) -> None:
    cluster = load_cluster(DEFAULT_CLUSTER)
    tried = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.data={data}"]
    tried += [f"model.path=models/{name}", f"actor.recompute={recompute}", f"parallel.sequence={str(tensor > 1).lower()}"]
    base = Config(name="x", model={"path": "x"}, data={"train": "x"})
    config = apply_overrides(base, [*SETTINGS, *tried])
    try:
        make(config, cluster, of_fill(config, 0.5), 0.0).require_fit()
        return
    except ConfigError as error:
        found = str(error)
    assert "the nearest layout that fits: " in found
    answer = found.split("the nearest layout that fits: ")[1].split()
    fitting = make(apply_overrides(config, answer), cluster, of_fill(config, 0.5), 0.0)
    fitting.require_fit()


def test_a_model_that_is_here_is_read_from_its_own_folder(tiny_model: Path) -> None:
    assert folder_of(str(tiny_model)) == tiny_model
    assert folder_of("models/Qwen2.5-Math-7B") == PUBLISHED / "Qwen2.5-Math-7B"
    with pytest.raises(ModelError, match=r"models/Qwen2.5-Math-8B has no config\.json.*did you mean 'qwen2\.5-math-7b'"):
        folder_of("models/Qwen2.5-Math-8B")


def test_running_servers_take_no_nodes_and_colocated_ones_share(recipe: str) -> None:
    elsewhere = of_recipe(recipe, ["rollout.urls=[http://a:1,http://b:1]"], Assumptions(DEFAULT_CLUSTER))
    assert (elsewhere.topology.nodes, elsewhere.engine) == (12, None)
    small = ["model.path=models/Qwen2.5-Math-1.5B", "data.max_response_length=2048", "parallel.tensor=1", "parallel.pipeline=1"]
    small += ["parallel.sequence=false", "parallel.data=8", "transfer.transport=cuda_ipc", "rollout.tensor_parallel=1"]
    small += ["rollout.servers=8"]
    shared = of_recipe(recipe, [*small, "rollout.gpu_memory_share=0.6"], Assumptions(ROOT / "recipes/clusters/h100x8.yaml"))
    shared.require_fit()
    assert shared.topology.is_colocated
    assert shared.engine.total + shared.trainer.total < 79.1 * 2**30
    (both,) = shared.moments
    assert both.total == shared.engine.total + shared.trainer.total
    turns = of_recipe(recipe, [*small, "rollout.sleep=true"], Assumptions(ROOT / "recipes/clusters/h100x8.yaml"))
    assert [moment.what for moment in turns.moments] == ["training steps", "weight transfers", "rollouts"]


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ([], "rollout.gpu_memory_share=0.69"),
        (["rollout.sleep=true"], "rollout.gpu_memory_share=0.82"),
        (["rollout.sleep=true", "actor.offload=all", "rollout.gpu_memory_share=0.97"], "rollout.gpu_memory_share=0.95"),
    ],
)
def test_a_share_beside_which_the_trainer_does_not_fit_is_refused_with_one_that_fits(given: list[str], answer: str) -> None:
    without = ["layout=one_node", "size=1.5B", "rollout.sleep=false", "actor.offload=none", "rollout.gpu_memory_share=0.92"]
    source, cluster = str(ROOT / "recipes/qwen2_5_math.py"), ROOT / "recipes/clusters/h100x8.yaml"
    found = of_recipe(source, [*without, *given], Assumptions(cluster))
    with pytest.raises(ConfigError, match=rf"of an engine on the same GPU, which has 79\.1.*\n{NEAREST} {answer}") as caught:
        found.require_fit()
    fitting = str(caught.value).split(NEAREST)[1].split()
    of_recipe(source, [*without, *given, *fitting], Assumptions(cluster)).require_fit()


@pytest.mark.slow
def test_every_published_model_has_a_plan(recipe: str) -> None:
    for folder in PUBLISHED.iterdir():
        moe = folder.name in ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "moe-1t")
        layout = ["parallel.expert=8", "parallel.expert_tensor=1"] if moe else []
        sizes = ["parallel.tensor=2", "parallel.pipeline=1", "parallel.data=8", "rollout.tensor_parallel=2"]
        short = ["data.max_prompt_length=512", "data.max_response_length=1024"]
        plan = of_recipe(recipe, [f"model.path={folder.name}", *sizes, *layout, *short], Assumptions())
        assert plan.source == folder
        assert all(scenario.seconds > 0 for scenario in plan.scenarios)
