"""The search for the fastest layout: beside every layout of a small cluster, and for the recipes that it was made for."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from megatron_hpt import recipe as recipes
from megatron_hpt.config import Config
from megatron_hpt.models.published import planned_shape
from megatron_hpt.overrides import apply_overrides
from megatron_hpt.plan.assumptions import DEFAULT_CLUSTER, Assumptions
from megatron_hpt.plan.cluster import ClusterConfig, load_cluster
from megatron_hpt.plan.plan import make, search_recipe
from megatron_hpt.plan.rollouts.lengths import of_fill
from megatron_hpt.plan.search import candidates
from megatron_hpt.plan.search import table as search_table
from megatron_hpt.plan.search.ranking import Ranking, _Layouts, search
from megatron_hpt.plan.search.trainers import OWN_GPUS, SPARE_GIB
from tests import programs

ROOT = Path(__file__).parents[2]
SEVENTY = str(ROOT / "recipes/llama_3_1.py")


def of(name: str, *overrides: str) -> Config:
    base = Config(name="x", model={"path": f"models/{name}"}, data={"train": "x"})
    given = ["model.dtype=bfloat16", "transfer.transport=nccl", "data.max_prompt_length=512", "data.max_response_length=1536"]
    return apply_overrides(base, [*given, *overrides])


def cluster(nodes: int, size: int = 8) -> ClusterConfig:
    return load_cluster(DEFAULT_CLUSTER).model_copy(update={"nodes": nodes, "gpus_per_node": size})


def ranking(config: Config, on: ClusterConfig, max_lag: int = 2, fill: float = 0.5) -> Ranking:
    return search(config, planned_shape(config)[0], on, of_fill(config, fill), 0.25, max_lag)


def every_layout(config: Config, on: ClusterConfig, max_lag: int) -> Iterator[Config]:
    """All that a search may answer, whether it fits or not."""
    shape, _ = planned_shape(config)
    for place, replica in itertools.product(candidates.placements(config, on), candidates.replicas(config, shape, on)):
        data, rest = divmod(place.trainer_ranks, replica.parallel.ranks)
        if rest:
            continue
        parallel = replica.parallel.model_copy(update={"data": data})
        offloads, lags = (["all"], [0]) if place.is_shared else (OWN_GPUS, range(max_lag + 1))
        for servers in candidates.engines(place.applied(config), shape, on, place.engine_gpus):
            for offload, lag in itertools.product(offloads, lags):
                actor = replica.actor.model_copy(update={"offload": offload})
                layout = servers.model_copy(update={"parallel": parallel, "actor": actor})
                yield candidates.changed(layout, rollout={"max_lag": lag})


@settings(max_examples=8, deadline=None, phases=(Phase.generate,))
@given(
    name=st.sampled_from(("Qwen2.5-Math-1.5B", "Llama-3.1-8B", "Qwen3-30B-A3B", "Llama-3.1-70B")),
    nodes=st.integers(1, 12),
    max_lag=st.integers(0, 2),
    fill=st.floats(0.05, 1),
)
@pytest.mark.slow
def test_what_is_listed_fits_is_sorted_and_takes_what_its_plan_says(name: str, nodes: int, max_lag: int, fill: float) -> None:
    config, on = of(name), cluster(nodes)
    assume(nodes > 1 or name in ("Qwen2.5-Math-1.5B", "Llama-3.1-8B"))
    found = ranking(config, on, max_lag, fill)
    seconds = [each.seconds for each in found.fastest]
    assert seconds == sorted(seconds)
    assert len({each.layout for each in found.fastest}) == len(seconds) <= 5
    for each in found.fastest:
        plan = make(each.config, on, of_fill(config, fill), 0.0)
        plan.require_fit()
        (scenario,) = (scenario for scenario in plan.scenarios if scenario.share == 0.25)
        assert scenario.seconds == pytest.approx(each.seconds)
        assert each.config.rollout.max_lag <= max_lag
        assert Config.model_validate(each.config.model_dump()) == each.config
    assert found.given is None or found.given.seconds >= seconds[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "size", "given"),
    [
        ("Qwen2.5-Math-1.5B", 1, 4, ()),
        ("Llama-3.1-8B", 2, 4, ("data.max_response_length=7680",)),
        ("Qwen3-30B-A3B", 3, 4, ()),
    ],
)
def test_no_layout_of_a_small_cluster_is_faster_than_the_first(
    monkeypatch: pytest.MonkeyPatch, name: str, nodes: int, size: int, given: tuple[str, ...]
) -> None:
    """Every layout is planned by itself; the search times few of them. A simulation may be a thousandth quicker for a slower
    trainer."""
    monkeypatch.setattr(candidates, "BATCHES", (1, 2))
    monkeypatch.setattr(candidates, "DEEPEST", 4)
    monkeypatch.setattr(candidates, "MOST_PIECES", 2)
    monkeypatch.setattr(candidates, "WIDEST_EXPERTS", 4)
    config, on = of(name, *given), cluster(nodes, size)
    shape, _ = planned_shape(config)
    best = ranking(config, on, max_lag=1).fastest[0]
    layouts = _Layouts(config, shape, on, of_fill(config, 0.5), 0.25, 1)
    timed = 0
    for layout in every_layout(config, on, max_lag=1):
        ranked = layouts.ranked(layout)
        if ranked and ranked.spare_gib >= SPARE_GIB:
            timed += 1
            assert ranked.seconds > 0.998 * best.seconds, layout
    assert timed > 50


def test_the_70b_on_sixteen_nodes_keeps_both_sides_busy() -> None:
    found = search_recipe(SEVENTY, ["size=70B"], Assumptions(DEFAULT_CLUSTER), share=0.25, max_lag=2)
    best = found.fastest[0]
    assert best.seconds < 110
    assert best.scenario.timeline.trainer_idle < 0.25
    assert best.scenario.timeline.engines_idle < 0.25
    assert best.seconds < 0.5 * found.by_lag[0].seconds
    assert found.by_lag[0].seconds > found.by_lag[1].seconds > found.by_lag[2].seconds


@pytest.mark.thorough
def test_a_thousand_gpus_are_searched() -> None:
    """Adds the size to the test above: 128 nodes, which take 13 s of a core."""
    found = search_recipe(SEVENTY, ["size=70B"], Assumptions(DEFAULT_CLUSTER, nodes=128), share=0.25, max_lag=2)
    config = found.fastest[0].config
    assert config.parallel.ranks + config.rollout.servers * config.rollout.tensor_parallel == 1024


@pytest.mark.parametrize(
    ("file", "given", "cluster_file", "nodes", "max_lag"),
    [
        ("llama_3_1.py", ["size=70B"], "h100x128", 16, 2),
        ("qwen2_5.py", [], "h100x128", 16, 2),
        ("qwen3_moe.py", [], "h100x128", 3, 2),
        ("qwen3_moe.py", ["layout=one_node"], "h200x8", 1, 0),
        ("qwen2_5_math.py", ["size=7B"], "h100x8", 1, 0),
        ("qwen2_5_math.py", ["size=7B", "layout=cluster"], "h100x128", 2, 0),
        ("llama_3_1.py", ["size=8B"], "h100x8", 1, 0),
        ("llama_3_1.py", ["size=8B", "layout=cluster"], "h100x128", 2, 0),
    ],
)
def test_the_recipes_have_the_winners_layouts(file: str, given: list[str], cluster_file: str, nodes: int, max_lag: int) -> None:
    """Within a hundredth; those that reproduce a publication sample from the newest weights, as it did."""
    on = Assumptions(ROOT / f"recipes/clusters/{cluster_file}.yaml", nodes)
    found = search_recipe(str(ROOT / "recipes" / file), given, on, 0.25, max_lag)
    assert found.given is not None
    assert found.given.config.rollout.max_lag <= max_lag
    assert found.given.seconds <= 1.01 * found.fastest[0].seconds, found.fastest[0].config


@pytest.mark.slow
def test_the_file_of_the_winner_is_taken_by_the_recipe(tmp_path: Path) -> None:
    found = search_recipe(SEVENTY, ["size=70B"], Assumptions(DEFAULT_CLUSTER, 10), 0.25, 1)
    search_table.write(tmp_path / "layout.yaml", found)
    again = recipes.load(SEVENTY, ["size=70B", "trainer.steps=7", f"@{tmp_path / 'layout.yaml'}"]).config
    best = found.fastest[0].config
    assert again == apply_overrides(best, ["trainer.steps=7"])
    mixture = search_recipe(str(ROOT / "recipes/qwen3_moe.py"), [], Assumptions(DEFAULT_CLUSTER, 4), 0.25, 1)
    search_table.write(tmp_path / "mixture.yaml", mixture)
    taken = recipes.load(str(ROOT / "recipes/qwen3_moe.py"), ["method=grpo", f"@{tmp_path / 'mixture.yaml'}"]).config
    assert taken.algorithm.name == "grpo"
    assert search_table.settings_of(taken) == search_table.settings_of(mixture.fastest[0].config)


def test_the_command_shows_the_five_fastest_and_why_the_next_is_slower(tmp_path: Path) -> None:
    out = tmp_path / "layout.yaml"
    done = programs.megatron_hpt("plan", SEVENTY, "size=70B", "--search", "--nodes", "16", "--write", str(out))
    assert done.returncode == 0, done.stderr
    for text in ("trainer idle", "engines idle", "training +", "the fastest with rollout.max_lag=0:", f"wrote {out}"):
        assert text in done.stdout
    assert out.read_text().startswith("# Llama-3.1-70B-hpt-cluster on h100x128: ")
    slow = programs.megatron_hpt("plan", SEVENTY, "size=70B", "--search", "--nodes", "1")
    assert slow.returncode == 1
    assert "no layout of Llama-3.1-70B-hpt-cluster was found that fits 1 node of h100x128" in slow.stderr
    far = programs.megatron_hpt("plan", SEVENTY, "size=70B", "--response-tokens", "9000")
    assert "--response-tokens: given 9000; responses have 8192 at most (data.max_response_length)" in far.stderr
