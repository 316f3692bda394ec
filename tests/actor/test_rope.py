"""Rotary frequencies beside those of transformers, for any numbers."""

from dataclasses import asdict
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_hpt.actor import platform
from megatron_hpt.actor.model.rope import inverse_frequencies, place
from megatron_hpt.models.hf_config import LinearScaling, Llama3Scaling, ModelShape, RopeScaling

NAMES = {LinearScaling: "linear", Llama3Scaling: "llama3"}


def shape_of(head_dim: int, theta: float, scaling: RopeScaling | None) -> ModelShape:
    sizes = {"layers": 1, "hidden": 2 * head_dim, "heads": 2, "kv_heads": 2, "head_dim": head_dim, "ffn": 8, "vocab": 8}
    constants = {"tied_embeddings": False, "norm_eps": 1e-6, "max_positions": 64}
    return ModelShape(family="llama", rope_theta=theta, rope_scaling=scaling, **sizes, **constants)


def config_of(shape: ModelShape) -> LlamaConfig:
    kind = "default" if shape.rope_scaling is None else NAMES[type(shape.rope_scaling)]
    numbers = {} if shape.rope_scaling is None else asdict(shape.rope_scaling)
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": kind, "rope_theta": shape.rope_theta, **numbers},
    )


factors = st.floats(1, 64)
llama3 = st.builds(
    lambda factor, low, wider, original: Llama3Scaling(factor, low, low + wider, original),
    *(factors, st.floats(0.1, 8), st.floats(0.1, 8), st.integers(1, 32768)),
)
shapes = st.builds(
    shape_of,
    st.integers(1, 64).map(lambda half: 2 * half),
    st.floats(100, 1e7),
    st.one_of(st.none(), st.builds(LinearScaling, factors), llama3),
)


@given(shapes)
def test_frequencies_are_those_of_transformers(shape: ModelShape) -> None:
    theirs = LlamaRotaryEmbedding(config_of(shape))  # by modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(inverse_frequencies(shape), theirs.inv_freq, rtol=1e-5, atol=0)


@given(shapes)
def test_a_placed_embedding_turns_as_transformers_does(shape: ModelShape) -> None:
    """Angles of all positions from Megatron's own module."""
    with platform.detect(threads=1).building():
        embedding = RotaryEmbedding(
            *(shape.head_dim, 1.0),
            rotary_base=shape.rope_theta,
            use_cpu_initialization=True,
            cp_group=SimpleNamespace(size=lambda: 1),
        )
    place(SimpleNamespace(rotary_pos_emb=embedding), shape)
    angles = embedding(shape.max_positions)[:, 0, 0]
    positions = torch.arange(shape.max_positions)[None]
    cosines, sines = LlamaRotaryEmbedding(config_of(shape))(torch.zeros(1), positions)
    torch.testing.assert_close(angles.cos(), cosines[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(angles.sin(), sines[0], rtol=0, atol=2e-5)
