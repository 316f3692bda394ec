"""Micro-batches of rows that were read from a ledger, and of the same rows written out by hand."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.actor.microbatch import MicroBatch, MicroBatchLayout, pack, pack_all
from megatron_hpt.batch.ledger import Ledger
from megatron_hpt.batch.rows import Batch, Row, Source

CPU = torch.device("cpu")
LAYERS, TOPK, EXPERTS = 2, 2, 4
LAYOUT = MicroBatchLayout(routers=(LAYERS, TOPK, EXPERTS))


@st.composite
def lists(draw: st.DrawFn) -> dict:
    """A row's fields, with Python lists for its arrays."""
    prompt, response = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    is_rollout, number = draw(st.booleans()), st.floats(-10, 10, width=32)
    of_response = st.lists(number, min_size=response, max_size=response)
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=6, max_size=6)
    chosen = [(draw(experts) * 2)[: LAYERS * TOPK] for _ in range(prompt + response - 1)]
    return {
        "tokens": draw(st.lists(st.integers(0, 2**17), min_size=prompt + response, max_size=prompt + response)),
        "prompt_length": prompt,
        "source": Source.ROLLOUT if is_rollout else Source.DEMONSTRATION,
        "behaviour_logprobs": draw(of_response) if is_rollout else None,
        "advantage": draw(st.none() | number),
        "token_advantages": draw(st.none() | of_response),
        "weight": draw(st.sampled_from([0.0, 0.25, 1.0])),
        "routes": chosen if is_rollout and draw(st.booleans()) else None,
    }


def row_of(values: dict) -> Row:
    return Row("p", 0, reward=None, policy_version=None, **values)


def by_hand(batch: list[dict]) -> dict[str, list]:
    """The micro-batch's columns, token by token; a token's values lie where it is predicted."""
    columns: dict[str, list] = {
        name: []
        for name in ("tokens", "targets", "positions", "logprobs", "advantages", "weights", "measured", "predicted", "routes")
    }
    for values in batch:
        fed, prompt = len(values["tokens"]) - 1, values["prompt_length"]
        for position in range(fed):
            at = position - (prompt - 1)
            is_response = at >= 0
            advantages, logprobs = values["token_advantages"], values["behaviour_logprobs"]
            columns["predicted"] += [len(columns["tokens"])] * is_response
            columns["tokens"].append(values["tokens"][position])
            columns["targets"].append(values["tokens"][position + 1])
            columns["positions"].append(position)
            columns["weights"].append(values["weight"] * is_response)
            columns["measured"].append(is_response and logprobs is not None)
            columns["logprobs"].append(logprobs[at] if is_response and logprobs is not None else 0.0)
            one = values["advantage"] or 0.0
            columns["advantages"].append((advantages[at] if advantages is not None else one) if is_response else 0.0)
            columns["routes"].append(values["routes"][position] if values["routes"] is not None else [-1] * LAYERS * TOPK)
    return columns


def tensors(batch: MicroBatch) -> dict[str, torch.Tensor]:
    packed = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "packing"}
    return {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)} | {
        "lengths": batch.packing.cu_seqlens_q,
        "routes": torch.zeros(0) if batch.packing.routes is None else batch.packing.routes,
    }


@settings(max_examples=60)
@given(batch=st.lists(lists(), min_size=1, max_size=5))
def test_views_into_a_ledger_pack_as_lists_do(tmp_path_factory: pytest.TempPathFactory, batch: list[dict]) -> None:
    made = [row_of(values) for values in batch]
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    ledger.write(Batch(0, made))
    views = ledger.read(0).rows
    (packed,), (of_views,) = (pack_all(rows, [range(len(batch))], CPU, LAYOUT) for rows in (made, views))
    assert {name: value.tolist() for name, value in tensors(of_views).items()} == {
        name: value.tolist() for name, value in tensors(packed).items()
    }
    expected, number = by_hand(batch), sum(len(values["tokens"]) - 1 for values in batch)
    assert of_views.tokens[0].tolist() == expected["tokens"]
    assert of_views.targets.tolist() == expected["targets"]
    assert of_views.positions[0].tolist() == expected["positions"]
    assert of_views.predicted.tolist() == expected["predicted"]
    assert of_views.measured.tolist() == expected["measured"]
    assert of_views.weights.tolist() == expected["weights"]
    assert of_views.behaviour_logprobs.tolist() == np.float32(expected["logprobs"]).tolist()
    assert of_views.advantages.tolist() == np.float32(expected["advantages"]).tolist()
    if any(values["routes"] is not None for values in batch):
        routes = of_views.packing.routes.transpose(0, 1).reshape(number, LAYERS * TOPK)
        assert routes.tolist() == expected["routes"]


def test_a_rank_without_rows_has_one_that_does_nothing() -> None:
    batch = pack([], CPU, LAYOUT)
    assert batch.tokens.tolist() == [[0]]
    assert not batch.weights.any()
