"""The two-way rules: any tensor parallel size holds every HF tensor exactly once and gives it back bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.errors import ModelError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import FAMILIES, Place, hf_tensor_shapes, shard_views
from megatron_hpt.transfer.boxes import Box, tiles, whole

SPARSE = ("mixtral", "qwen3_moe")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """A random small model and a tensor parallel size that divides it; the vocabulary need not divide."""
    tp, family = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([*FAMILIES]))
    kv = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n % tp == 0 or tp % n == 0]))  # also fewer than ranks
    heads, head_dim = tp * kv * draw(st.integers(1, 2)), draw(st.sampled_from([4, 8]))
    shape = ModelShape(
        family=family,
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.sampled_from([4, 6])),
        heads=heads,
        kv_heads=kv,
        head_dim=head_dim,
        ffn=tp * draw(st.integers(1, 3)),
        vocab=draw(st.integers(1, 17)),
        tied_embeddings=draw(st.booleans()),
        rope_theta=1e4,
        norm_eps=1e-6,
        max_positions=8,
        experts=draw(st.integers(2, 3)) if family in SPARSE else 0,
        experts_per_token=2 if family in SPARSE else 0,
        qk_norm=family.startswith("qwen3"),
    )
    return shape, tp


def local_parameters(shape: ModelShape, tp: int) -> dict[str, torch.Tensor]:
    """Uninitialised parameters of one rank, in Megatron's names and shapes."""
    vocab = -(-shape.vocab // tp)
    parameters = {
        "embedding.word_embeddings.weight": (vocab, shape.hidden),
        "decoder.final_layernorm.weight": (shape.hidden,),
        "output_layer.weight": (vocab, shape.hidden),
    }
    for i in range(shape.layers):
        parameters |= local_attention(f"decoder.layers.{i}", shape, tp) | local_mlp(f"decoder.layers.{i}.mlp", shape, tp)
    return {name: torch.full(size, float("nan")) for name, size in parameters.items()}


def local_attention(layer: str, shape: ModelShape, tp: int) -> dict[str, tuple[int, ...]]:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = {f"{layer}.self_attention.{x}_layernorm.weight": (shape.head_dim,) for x in "qk"}
    return {
        f"{layer}.input_layernorm.weight": (shape.hidden,),
        f"{layer}.pre_mlp_layernorm.weight": (shape.hidden,),
        f"{layer}.self_attention.linear_qkv.weight": (rows := (q + 2 * kv) // tp, shape.hidden),
        **({f"{layer}.self_attention.linear_qkv.bias": (rows,)} if shape.family == "qwen2" else {}),
        f"{layer}.self_attention.linear_proj.weight": (shape.hidden, q // tp),
        **(norms if shape.qk_norm else {}),
    }


def local_mlp(mlp: str, shape: ModelShape, tp: int) -> dict[str, tuple[int, ...]]:
    experts = [f"{mlp}.experts.local_experts.{i}" for i in range(shape.experts)]
    parameters = {f"{mlp}.router.weight": (shape.experts, shape.hidden)} if experts else {}
    for network in experts or [mlp]:
        parameters[f"{network}.linear_fc1.weight"] = (2 * shape.ffn // tp, shape.hidden)
        parameters[f"{network}.linear_fc2.weight"] = (shape.hidden, shape.ffn // tp)
    return parameters


@given(shapes())
def test_load_and_export_are_inverse_and_tile_every_tensor(drawn: tuple[ModelShape, int]) -> None:
    shape, tp = drawn
    whole_tensors = {name: torch.randn(size) for name, size in hf_tensor_shapes(shape).items()}
    back = {name: torch.full_like(tensor, float("nan")) for name, tensor in whole_tensors.items()}
    pieces: dict[str, list[Box]] = {name: [] for name in whole_tensors}
    for rank in range(tp):
        for name, local in local_parameters(shape, tp).items():
            for view in shard_views(name, local, shape, Place(rank, tp), loading=True):
                view.write(whole_tensors[view.name])
            views = shard_views(name, local, shape, Place(rank, tp))
            views = [v for v in views if rank == 0 or not v.copied]
            for view in views:
                pieces[view.name].append(Box(view.offset, view.extent))
                back[view.name][tuple(slice(o, o + e) for o, e in zip(view.offset, view.extent, strict=True))] = view.read()
    for name, tensor in whole_tensors.items():
        assert tiles(pieces[name], whole(tuple(tensor.shape))) is None
        assert torch.equal(back[name], tensor), name


def test_query_groups_are_interleaved_as_megatron_wants() -> None:
    shape = ModelShape("llama", 1, 1, 4, 2, 1, 1, 1, False, 1e4, 1e-6, 8)
    local = torch.empty(8, 1)
    whole = {"q": torch.tensor([[0.0], [1], [2], [3]]), "k": torch.tensor([[10.0], [11]]), "v": torch.tensor([[20.0], [21]])}
    for view in shard_views("decoder.layers.0.self_attention.linear_qkv.weight", local, shape, Place()):
        view.write(whole[view.name.split(".")[-2][0]])
    assert local.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_an_unknown_parameter_is_refused() -> None:
    shape = ModelShape("llama", 1, 1, 4, 2, 1, 1, 1, False, 1e4, 1e-6, 8)
    with pytest.raises(ModelError, match=r"no rule .* 'decoder\.layers\.0\.mamba\.weight'"):
        shard_views("decoder.layers.0.mamba.weight", torch.empty(1), shape, Place())
