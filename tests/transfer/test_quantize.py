"""FP8 bytes beside an encoder written from the definition of e4m3fn; boxes beside boxes of the quantised whole."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hpt.errors import TransferError
from megatron_hpt.models.hf_config import ModelShape
from megatron_hpt.models.mapping import ShardView, hf_tensor_shapes
from megatron_hpt.transfer import boxes
from megatron_hpt.transfer.quantize import (
    BLOCK_128,
    PER_TENSOR,
    BlockWise,
    Fp8Format,
    check_cut,
    is_quantized,
    quantize,
    quantized_shapes,
)

NAME = "model.layers.0.mlp.down_proj.weight"
FORMATS = [BLOCK_128, PER_TENSOR]


def decode(code: int) -> float:
    """Value of an e4m3fn code: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, all ones is nan."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


VALUES = np.array([decode(code) for code in range(256)])
POSITIVE = VALUES[:127]
"""Ascending, 0 to 448: the code is the index, so an even code is an even mantissa."""


def encode(values: np.ndarray) -> np.ndarray:
    """Codes nearest to `values` (float32, at most 448 after clamping), ties to the even mantissa; the sign of zero stays."""
    size = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    above = np.clip(np.searchsorted(POSITIVE, size), 1, 126)
    below = above - 1
    to_below, to_above = size - POSITIVE[below], POSITIVE[above] - size
    code = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return (code + 128 * np.signbit(values)).astype(np.uint8)


def expected_bytes(weight: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a float32 matrix with a scale for each block of `rows` × `columns`, one block at a time."""
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    codes, scales = np.empty(weight.shape, np.uint8), np.empty(grid, np.float32)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            amax = np.abs(weight[place]).max()
            scales[i, j] = np.float32(1) if amax == 0 else max(amax, np.float32(1e-10)) / np.float32(448)
            codes[place] = encode(weight[place] * (np.float32(1) / scales[i, j]))
    return codes, scales


def whole(weight: torch.Tensor, name: str = NAME) -> ShardView:
    """A tensor as the box that is all of it."""
    return ShardView(name, tuple(weight.shape), (0, 0), tuple(weight.shape), weight)


def cut(weight: torch.Tensor, dim: int, start: int, size: int) -> ShardView:
    """`size` rows or columns of a matrix from `start`, as a view of it."""
    offset, extent = [0, 0], list(weight.shape)
    offset[dim], extent[dim] = start, size
    return ShardView(NAME, tuple(weight.shape), tuple(offset), tuple(extent), weight.narrow(dim, start, size))


def as_bytes(box: ShardView) -> np.ndarray:
    """The codes of a quantised weight."""
    assert box.view.dtype == torch.float8_e4m3fn
    return box.view.view(torch.uint8).numpy()


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Ragged float32 and bfloat16 matrices whose blocks reach from 1e-6 to 1e4, with some rows of zeros."""
    shape = draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = random.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 4))
    if draw(st.booleans()):
        weight *= 10.0 ** random.uniform(-3, 3, (shape[0], 1))
    weight[: draw(st.sampled_from([0, 1, 128, 200]))] = 0
    return torch.tensor(weight, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))


def test_all_256_codes_are_the_definition() -> None:
    mine = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(mine, VALUES.astype(np.float32))
    assert POSITIVE.max() == 448
    assert np.all(np.diff(POSITIVE) > 0)


@settings(deadline=None, max_examples=60)
@given(matrices())
def test_bytes_and_scales_of_blocks(weight: torch.Tensor) -> None:
    codes, scale = quantize(whole(weight), BLOCK_128)
    expected_codes, expected_scales = expected_bytes(weight.float().numpy(), 128, 128)
    np.testing.assert_array_equal(scale.view.numpy(), expected_scales)
    np.testing.assert_array_equal(as_bytes(codes), expected_codes)
    assert (scale.name, scale.shape, scale.offset) == (NAME + "_scale_inv", expected_scales.shape, (0, 0))


@settings(deadline=None, max_examples=60)
@given(matrices())
def test_bytes_and_scale_of_a_tensor(weight: torch.Tensor) -> None:
    codes, scale = quantize(whole(weight), PER_TENSOR)
    expected_codes, expected_scales = expected_bytes(weight.float().numpy(), *weight.shape)
    np.testing.assert_array_equal(scale.view.numpy(), expected_scales[0])
    np.testing.assert_array_equal(as_bytes(codes), expected_codes)
    assert (scale.name, scale.shape, scale.offset) == (NAME + "_scale", (1,), (0,))


def test_ties_go_to_the_even_mantissa() -> None:
    # With 448 among them the scale is 1: every midpoint between two codes, just below it and just above it.
    middle = ((POSITIVE[:-1] + POSITIVE[1:]) / 2).astype(np.float32)
    around = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500)), [448]])
    weight = np.stack([around, -around]).astype(np.float32)
    codes, scale = quantize(whole(torch.from_numpy(weight)), PER_TENSOR)
    assert scale.view.tolist() == [1.0]
    np.testing.assert_array_equal(as_bytes(codes), encode(weight))
    assert np.all(as_bytes(codes)[:, :126] % 2 == 0)


def test_golden_bytes() -> None:
    # Times 448: 448, -224, 134.4, 0.448, 0.00134 and 0, -0, 0.0314, -448, -0.00538 (the last of each row are subnormal).
    weight = torch.tensor([[1.0, -0.5, 0.3, 1e-3, 3e-6], [0.0, -0.0, 7e-5, -1.0, -1.2e-5]])
    codes, scale = quantize(whole(weight), BLOCK_128)
    assert as_bytes(codes).tobytes().hex() == "7ef6702e01" + "008010fe83"
    assert scale.view.numpy().astype("<f4").tobytes().hex() == "2549123b"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_independent_encoder(dtype: torch.dtype) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = quantize(whole(weight), PER_TENSOR)
    scaled = weight.float().numpy() * (np.float32(1) / scale.view.numpy())
    expected = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(as_bytes(codes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_scales_of_vllms_own_cast(dtype: torch.dtype) -> None:
    deep_gemm = pytest.importorskip("vllm.utils.deep_gemm")
    weight = (torch.randn(300, 517, generator=torch.Generator().manual_seed(4)) * 0.02).to(dtype)
    expected_codes, expected_scales = deep_gemm.per_block_cast_to_fp8(weight)
    codes, scale = quantize(whole(weight), BLOCK_128)
    assert torch.equal(scale.view, expected_scales)
    assert torch.equal(codes.view.view(torch.uint8), expected_codes.view(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(matrices())
def test_error_is_bounded_by_the_amax_of_the_block(weight: torch.Tensor) -> None:
    codes, scale = quantize(whole(weight), BLOCK_128)
    exact = weight.double().numpy()
    scales = np.kron(scale.view.double().numpy(), np.ones((128, 128)))[: exact.shape[0], : exact.shape[1]]
    error = np.abs(VALUES[as_bytes(codes)] * scales - exact)
    # Half a step of 3 mantissa bits for normal numbers, half of the smallest code below them; float32 rounds the rest.
    assert np.all(error <= np.maximum(np.abs(exact) * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5))
    amax = np.abs(exact).max()
    assert error.max() <= amax * 2.0**-4 * (1 + 1e-5)


@pytest.mark.parametrize("fp8", FORMATS)
def test_zeros_and_the_smallest_numbers_have_finite_scales(fp8: Fp8Format) -> None:
    codes, scale = quantize(whole(torch.zeros(130, 130)), fp8)
    assert not as_bytes(codes).any()
    assert torch.equal(scale.view, torch.ones_like(scale.view))
    codes, scale = quantize(whole(torch.full((3, 3), 1e-44)), fp8)
    assert not as_bytes(codes).any()
    assert torch.isfinite(1 / scale.view).all()


def assert_tiled(views, expected: dict[str, tuple[int, ...]]) -> None:
    """The views are exactly the expected tensors, each covered once."""
    found: dict[str, list[boxes.Box]] = {}
    for view in views:
        assert view.shape == expected[view.name]
        found.setdefault(view.name, []).append(boxes.Box(view.offset, view.extent))
    assert found.keys() == expected.keys()
    for name, pieces in found.items():
        assert boxes.tiles(pieces, boxes.whole(expected[name])) is None


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_aligned_boxes_are_boxes_of_the_whole(data: st.DataObject) -> None:
    dim, size = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([128, 256, 384, 300, 500]))
    shape = [data.draw(st.sampled_from([40, 128, 200])), 0]
    shape = [size, shape[0]] if dim == 0 else [shape[0], size]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).bfloat16()
    codes, scale = quantize(whole(weight), BLOCK_128)
    edges = sorted({0, size, *data.draw(st.lists(st.integers(1, (size - 1) // 128 or 1).map(lambda n: min(size, n * 128))))})
    pieces = [quantize(cut(weight, dim, a, b - a), BLOCK_128) for a, b in itertools.pairwise(edges)]
    for box, whole_box in ((0, codes), (1, scale)):
        for piece in (p[box] for p in pieces):
            rows, columns = (slice(o, o + e) for o, e in zip(piece.offset, piece.extent, strict=True))
            assert torch.equal(piece.view.view(torch.uint8), whole_box.view[rows, columns].contiguous().view(torch.uint8))
    expected = {name: form for name, (form, _) in quantized_shapes({NAME: tuple(shape)}, BLOCK_128, "bfloat16").items()}
    assert_tiled([view for piece in pieces for view in piece], expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_boxes_with_the_reduced_amax_are_boxes_of_the_whole(dim: int) -> None:
    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize(whole(weight), PER_TENSOR)
    boxes = [cut(weight, dim, start, 32) for start in (0, 32, 64)]
    amax = torch.stack([PER_TENSOR.amax(box.read()) for box in boxes]).amax(0)
    pieces = [quantize(box, PER_TENSOR, amax) for box in boxes]
    assert [len(p) for p in pieces] == [2, 1, 1]
    assert torch.equal(pieces[0][1].view, scale.view)
    together = torch.cat([p[0].view.view(torch.uint8) for p in pieces], dim)
    assert torch.equal(together, codes.view.view(torch.uint8))
    assert_tiled([view for piece in pieces for view in piece], {NAME: (96, 96), NAME + "_scale": (1,)})


def test_a_common_amax_survives_the_loaders_second_rounding() -> None:
    # What vLLM and SGLang do to the parts of a fused projection (requantize_with_max_scale): through float16 and back.
    for amax in (0.02, 0.3, 50.0):
        part = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
        part *= 0.5 * amax / part.abs().max()
        codes, scale = quantize(whole(part), PER_TENSOR, torch.tensor([amax]))
        again = (codes.view.to(torch.float16) * scale.view[0]).float() * scale.view.reciprocal()
        assert torch.equal(again.to(torch.float8_e4m3fn).view(torch.uint8), codes.view.view(torch.uint8))


@pytest.mark.parametrize(
    ("offset", "extent", "shape", "aligned"),
    [
        ((0, 0), (256, 200), (256, 200), True),
        ((128, 0), (128, 200), (256, 200), True),
        ((128, 0), (72, 256), (200, 256), True),
        ((0, 128), (256, 72), (256, 200), True),
        ((64, 0), (128, 200), (256, 200), False),
        ((0, 0), (64, 200), (256, 200), False),
        ((0, 128), (256, 64), (256, 200), False),
    ],
)
def test_alignment_of_cuts(offset: tuple[int, int], extent: tuple[int, int], shape: tuple[int, int], *, aligned: bool) -> None:
    assert BLOCK_128.aligned(offset, extent, shape) is aligned
    assert PER_TENSOR.aligned(offset, extent, shape) is (extent == shape)


@pytest.mark.parametrize("fp8", FORMATS)
def test_a_cut_that_is_not_aligned_is_named(fp8: Fp8Format) -> None:
    box = cut(torch.ones(256, 256), 0, 64, 64)
    with pytest.raises(TransferError, match=r"down_proj\.weight \[256, 256\]: the box at \[64, 0\]") as caught:
        quantize(box, fp8)
    assert fp8.allowed in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "extent", "shape"), [((0, 0), (0, 128), (128, 128)), ((128, 0), (128, 128), (200, 128)), ((0,), (4,), (4,))]
)
def test_boxes_outside_and_vectors_are_refused(
    offset: tuple[int, ...], extent: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    for fp8 in FORMATS:
        with pytest.raises(TransferError, match="allowed: "):
            check_cut(NAME, offset, extent, shape, fp8)


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(fp8: Fp8Format, bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(130, 3, dtype=dtype)
    weight[129, 1] = bad
    with pytest.raises(TransferError, match=r"down_proj\.weight: the weight is not finite: 1 value"):
        quantize(whole(weight), fp8)


def test_amax_that_does_not_fit_is_refused() -> None:
    box = whole(torch.full((4, 4), 2.0))
    for amax in (torch.tensor([1.0]), torch.tensor([math.nan]), torch.tensor([math.inf])):
        with pytest.raises(TransferError, match="is not that of the whole tensor"):
            quantize(box, PER_TENSOR, amax)
    for amax in (torch.tensor(4.0), torch.tensor([4.0, 4.0]), torch.tensor([4.0], dtype=torch.bfloat16)):
        with pytest.raises(TransferError, match="takes no amax"):
            quantize(box, PER_TENSOR, amax)
    with pytest.raises(TransferError, match="takes no amax"):
        quantize(box, BLOCK_128, torch.tensor([4.0]))


def test_other_tensors_and_dtypes_are_refused() -> None:
    with pytest.raises(TransferError, match=r"mlp\.gate\.weight is not quantised"):
        quantize(whole(torch.ones(2, 2), "model.layers.0.mlp.gate.weight"), BLOCK_128)
    with pytest.raises(TransferError, match="float16 cannot be quantised"):
        quantize(whole(torch.ones(2, 2, dtype=torch.float16)), BLOCK_128)


def test_which_tensors_are_quantised() -> None:
    layer = "model.layers.11."
    linear = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    linear += [f"mlp.experts.127.{x}_proj" for x in ("gate", "up", "down")]
    linear += [f"block_sparse_moe.experts.7.w{x}" for x in "123"]
    kept = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    kept += ["mlp.gate", "block_sparse_moe.gate"]
    assert all(is_quantized(f"{layer}{x}.weight") for x in linear)
    assert not any(is_quantized(f"{layer}{x}.weight") for x in kept)
    assert not any(is_quantized(x) for x in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"))
    for unknown in ("model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        with pytest.raises(TransferError, match=f"^{unknown}: no rule"):
            is_quantized(unknown)


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize(("family", "experts"), [("llama", 0), ("mixtral", 2)])
def test_quantized_shapes_are_what_quantize_makes(fp8: Fp8Format, family: str, experts: int) -> None:
    shape = ModelShape(
        family=family,
        layers=2,
        hidden=200,
        heads=4,
        kv_heads=2,
        head_dim=40,
        ffn=130,
        vocab=50,
        tied_embeddings=False,
        rope_theta=1e4,
        norm_eps=1e-6,
        max_positions=8,
        experts=experts,
    )
    made = {}
    for name, form in hf_tensor_shapes(shape).items():
        box = ShardView(name, form, (0,) * len(form), form, torch.ones(form, dtype=torch.bfloat16))
        for out in quantize(box, fp8) if is_quantized(name) else [box]:
            assert tuple(out.view.shape) == out.extent == out.shape
            made[out.name] = (out.shape, str(out.view.dtype).removeprefix("torch."))
    assert quantized_shapes(hf_tensor_shapes(shape), fp8, "bfloat16") == made
    down = "model.layers.0.block_sparse_moe.experts.1.w2.weight" if experts else NAME
    assert made[down + fp8.suffix] == (((2, 2) if fp8 == BLOCK_128 else (1,)), "float32")


def test_other_block_sizes_are_data() -> None:
    weight = torch.randn(70, 33, generator=torch.Generator().manual_seed(3))
    codes, scale = quantize(whole(weight), BlockWise(32))
    expected_codes, expected_scales = expected_bytes(weight.numpy(), 32, 32)
    np.testing.assert_array_equal(as_bytes(codes), expected_codes)
    np.testing.assert_array_equal(scale.view.numpy(), expected_scales)
