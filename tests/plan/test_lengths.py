"""How long responses are taken to be: from a mean, or as a run's ledger has them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt import recipe as recipes
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.errors import ConfigError
from megatron_hpt.plan.assumptions import DEFAULT_CLUSTER, Assumptions
from megatron_hpt.plan.cluster import load_cluster
from megatron_hpt.plan.plan import make
from megatron_hpt.plan.rollouts.ledger_lengths import NEWEST_STEPS, of_ledger
from megatron_hpt.plan.rollouts.lengths import of_means, of_responses
from megatron_hpt.run import RunDir, create

ROOT = Path(__file__).parents[2]


@given(share=st.floats(0.005, 1), limit=st.integers(64, 100_000))
def test_responses_of_a_mean_have_it_and_stay_within_their_limit(share: float, limit: int) -> None:
    lengths = of_means(100, share * limit, limit, "x")
    tokens, shares = zip(*lengths.parts, strict=True)
    assert sum(shares) == pytest.approx(1)
    assert list(tokens) == sorted(tokens)
    assert 0 < tokens[0] <= lengths.longest <= limit
    assert lengths.response == pytest.approx(share * limit, rel=0.02)


def test_short_responses_have_a_long_tail_and_those_of_half_the_limit_are_even() -> None:
    short, half = of_means(0, 800, 8000, "x"), of_means(0, 4000, 8000, "x")
    assert short.longest > 6 * short.response
    assert half.longest == pytest.approx(8000, rel=0.01)
    tokens = [tokens for tokens, share in half.parts if share == pytest.approx(1 / 12)]
    assert tokens == pytest.approx([8000 / 12 * (part + 0.5) for part in range(11)], rel=0.01)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300), st.integers(1, 3000))
def test_measured_responses_keep_their_mean_and_their_tail(tokens: list[int], count: int) -> None:
    parts = of_responses(sorted(tokens))
    assert sum(each * share for each, share in parts) == pytest.approx(sum(tokens) / len(tokens))
    assert parts[-1][0] == max(tokens)
    assert len(of_means(50, 900, 4000, "x").rows(count)) == count


def row(tokens: int, source: Source) -> Row:
    logprobs = [0.0] * tokens if source is Source.ROLLOUT else None
    return Row("a", 0, source, [1] * (10 + tokens), 10, logprobs, None, None, 1.0, None)


def test_the_lengths_of_a_ledger_are_those_of_its_newest_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.batches.mkdir()
    with pytest.raises(ConfigError, match="has no rollouts in its ledger yet"):
        of_ledger(run)
    ledger = Ledger(run.batches)
    ledger.write(Batch(0, [row(4000, Source.ROLLOUT)]))
    for step in range(1, NEWEST_STEPS + 1):
        ledger.write(Batch(step, [row(100, Source.ROLLOUT), row(300, Source.ROLLOUT), row(50, Source.DEMONSTRATION)]))
    found = of_ledger(run)
    assert (found.prompt, found.response, found.longest, found.demonstration) == (10, pytest.approx(200), 300, 50)
    assert "20 rollouts" in found.origin
    assert "steps 1 to 10" in found.origin


def test_a_plan_takes_the_lengths_of_a_run(tmp_path: Path) -> None:
    config = recipes.load(str(ROOT / "recipes/llama_3_1.py"), ["size=70B"]).config
    run = create(config, tmp_path)
    Ledger(run.batches).write(Batch(0, [row(tokens, Source.ROLLOUT) for tokens in (100, 200, 2400)]))
    lengths = Assumptions(run=run.path).lengths_of(config)
    assert (lengths.response, lengths.longest) == (pytest.approx(900), 2400)
    mean = Assumptions(response_tokens=900).lengths_of(config)
    assert mean.response == pytest.approx(900, rel=0.02)
    assert mean.longest > 5000
    seconds = [make(config, load_cluster(DEFAULT_CLUSTER), each, 0.0).scenarios[1].generation.total for each in (lengths, mean)]
    assert seconds[0] < 0.6 * seconds[1]  # the same tokens, but a shorter tail
