"""Router replay: recorded experts for rollouts, live routing for demonstrations, in any layout."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_hpt.actor.microbatch import MicroBatchLayout, pack
from megatron_hpt.actor.model.routing import RouterReplay
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source
from megatron_hpt.config import ActorConfig
from megatron_hpt.errors import DataError
from megatron_hpt.examples import tiny_families

from .test_actor import Layouts, Outcome, assert_same, token_logprobs

LAYERS, EXPERTS, TOPK = 2, 4, 2
LAYOUTS = {
    "EP2 of CP2": {"context": 2, "expert": 2},
    "TP2, SP, EP2, ETP1": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1},
    "PP2 x DP2": {"pipeline": 2, "data": 2},
}


def test_recorded_experts_replace_live_ones_and_keep_their_own_scores() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    replay = RouterReplay()

    def top(scores: torch.Tensor, topk: int, groups: None, of_group: None) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.topk(scores, topk)

    assert replay.get_replay_topk(scores, 2, None, None, top)[1].tolist() == [[3, 2], [0, 1]]
    replay.recorded = torch.tensor([[0, 2], [-1, -1]])
    values, chosen = replay.get_replay_topk(scores, 2, None, None, top)
    assert chosen.tolist() == [[0, 2], [0, 1]]
    torch.testing.assert_close(values, torch.tensor([[0.1, 0.3], [0.4, 0.3]]))


def test_routes_of_another_model_are_refused() -> None:
    cut = MicroBatchLayout(routers=(LAYERS, TOPK, EXPERTS))
    row = Row("p7", 0, Source.ROLLOUT, [1, 2, 3], 1, [-1.0, -1.0], 1.0, 1.0, 1.0, 0)
    good = np.zeros((2, LAYERS, TOPK), dtype=np.int16)
    assert pack([replace(row, routes=good)], torch.device("cpu"), cut).packing.routes.shape == (LAYERS, 2, TOPK)
    for bad in (good[:1], good + EXPERTS, good - 1):
        with pytest.raises(DataError, match=r"prompt p7: .*2 tokens × 2 layers × 2 of experts 0 to 3"):
            pack([replace(row, routes=bad)], torch.device("cpu"), cut)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Three batches: rollouts with random experts, whose log-probabilities transformers computed through just those."""
    folder = tmp_path_factory.mktemp("routing")
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOPK}
    tiny_families.write(folder / "model", "mixtral", num_hidden_layers=LAYERS, **experts)
    layouts, rng = Layouts(folder, folder / "model"), random.Random(0)
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for step in range(3):
        rows = layouts_rows(layouts, step)
        Ledger(folder / "routed").write(Batch(step, [with_routes(row, network, rng) for row in rows]))
        Ledger(folder / "forgotten").write(Batch(step, [replace(with_routes(row, network, rng), routes=None) for row in rows]))
    return layouts


def layouts_rows(layouts: Layouts, step: int) -> list[Row]:
    return list(Ledger(layouts.folder / "ledger").read(step).rows)


def with_routes(row: Row, network: torch.nn.Module, rng: random.Random) -> Row:
    if row.source is not Source.ROLLOUT:
        return row
    routes = np.array([[rng.sample(range(EXPERTS), TOPK) for _ in range(LAYERS)] for _ in row.tokens[1:]], dtype=np.int16)
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, inputs, out, i=i: through(out, routes[:, i]))
        for i, layer in enumerate(network.model.layers)
    ]
    with torch.no_grad():
        logprobs = token_logprobs(network, row.tokens)[0][row.prompt_length - 1 :].tolist()
    for hook in hooks:
        hook.remove()
    return replace(row, routes=routes, behaviour_logprobs=logprobs)


def through(out: tuple[torch.Tensor, ...], experts: np.ndarray) -> tuple[torch.Tensor, ...]:
    """What transformers' router would have given had it chosen these experts; the last token is fed only by it."""
    logits, _, live = out
    chosen = torch.cat([torch.from_numpy(experts.astype(np.int64)), live[len(experts) :]])
    return logits, logits.gather(1, chosen).softmax(-1), chosen


@pytest.fixture(scope="module")
def one_rank(layouts: Layouts) -> Outcome:
    return layouts.run("one", ledger="routed", budget=10_000)


@pytest.mark.gpu
@pytest.mark.slow
def test_rollouts_go_through_the_recorded_experts_as_in_transformers(layouts: Layouts, one_rank: Outcome) -> None:
    assert one_rank.metrics[0]["mismatch/logprob_gap"] < 1e-5
    assert layouts.run("live", ledger="forgotten", last=1).metrics[0]["mismatch/logprob_gap"] > 1e-3


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_is_the_same_in_every_layout(layouts: Layouts, one_rank: Outcome, layout: str) -> None:
    recompute = {"actor": ActorConfig(micro_batch_tokens=40, recompute="full")}
    found = layouts.run(layout.replace(" ", "_"), ledger="routed", sections=recompute, **LAYOUTS[layout])
    assert_same(found, one_rank)
