"""transformer_engine_torch of Transformer Engine 2.11 in plain torch: what a bfloat16 or per-tensor FP8 decoder calls of it.

All of Transformer Engine's Python is the real wheel's; this module has the names that it expects of the compiled extension
(transformer_engine/pytorch/csrc/extensions/pybind.cpp). A function that is not written here raises NotImplementedError with
its name when it is called.
"""

import itertools

import torch


class _Member(int):
    """A member of an enumeration, which like pybind's is a number with a name."""

    def __new__(cls, value, name):
        self = int.__new__(cls, value)
        self.name = name
        return self

    def __repr__(self):
        return self.name

    value = property(int)


class _Enumeration(type):
    """An enumeration whose further members appear when they are asked for."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Member(next(cls._numbers), f"{cls.__name__}.{name}"))
        return cls.__dict__[name]

    def __call__(cls, value):
        return value


def _enumeration(name, *members):
    cls = _Enumeration(name, (), {"_numbers": itertools.count()})
    for member in members:
        getattr(cls, member)
    return cls


DType = _enumeration(
    *("DType", "kByte", "kInt16", "kInt32", "kInt64", "kFloat32", "kFloat16", "kBFloat16"),
    *("kFloat8E4M3", "kFloat8E5M2", "kFloat8E8M0", "kFloat4E2M1"),
)
FP8FwdTensors = _enumeration("FP8FwdTensors", *(f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")))
FP8BwdTensors = _enumeration("FP8BwdTensors", *(f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")))
CommOverlapType = _enumeration("CommOverlapType", "RS", "AG")
CommOverlapAlgo = _enumeration("CommOverlapAlgo")
CommGemmOverlapRole = _enumeration("CommGemmOverlapRole")
Float8BlockScaleTensorFormat = _enumeration("Float8BlockScaleTensorFormat", "GEMM_READY", "COMPACT")
NVTE_Fused_Attn_Backend = _enumeration(
    "NVTE_Fused_Attn_Backend", "NVTE_F16_max512_seqlen", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend"
)
NVTE_QKV_Layout = _enumeration("NVTE_QKV_Layout")
NVTE_QKV_Format = _enumeration("NVTE_QKV_Format", "NVTE_SBHD", "NVTE_BSHD", "NVTE_THD")
NVTE_Bias_Type = _enumeration("NVTE_Bias_Type")
NVTE_Mask_Type = _enumeration("NVTE_Mask_Type")
NVTE_Softmax_Type = _enumeration("NVTE_Softmax_Type")


class FP8TensorMeta:
    scale = scale_inv = amax_history = None


class _Unavailable:
    def __init__(self, *_, **__):
        raise NotImplementedError(type(self).__name__)


CommOverlapHelper, CommOverlap, CommOverlapP2P = (
    type(name, (_Unavailable,), {}) for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P")
)

_FP8 = {DType.kFloat8E4M3: (torch.float8_e4m3fn, 448.0), DType.kFloat8E5M2: (torch.float8_e5m2, 57344.0)}
_TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kInt32: torch.int32,
    DType.kByte: torch.uint8,
}
_TINY = 1e-30


def get_cublasLt_version():
    return 130100


def get_cudnn_version():
    return 92000


def get_num_cublas_streams():
    return 4


def device_supports_multicast(*_):
    return False


def get_stream_priority_range(*_):
    return (0, -5)


def ubuf_built_with_mpi():
    return False


# FP8 with one scale a tensor


def _is_quantized(tensor):
    return hasattr(tensor, "_fp8_dtype") and hasattr(tensor, "_scale_inv")


def _dense(tensor):
    """Return the float32 values of a tensor, FP8 or not."""
    if not _is_quantized(tensor):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise NotImplementedError(f"{type(tensor).__name__} in a product")
        return tensor.float()
    kind = _FP8[tensor._fp8_dtype][0]
    if tensor._data is not None:
        return tensor._data.view(kind).float() * tensor._scale_inv
    return tensor._transpose.view(kind).float().movedim(0, -1) * tensor._scale_inv


def quantize(tensor, quantizer, output=None, noop=None):
    if quantizer is None:
        return tensor
    values = tensor.detach().float()
    amax = values.abs().max() if values.numel() else values.new_zeros(())
    scale, (kind, largest) = _scale(quantizer, amax), _FP8[quantizer.dtype]
    out = output if output is not None else quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    data = (values * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    if out._data is not None:
        out._data.copy_(data)
    if out._transpose is not None:
        out._transpose.copy_(data.reshape(-1, data.shape[-1]).t().reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_(scale.reciprocal().reshape(out._scale_inv.shape))
    return out


def _scale(quantizer, amax):
    name, largest = type(quantizer).__name__, _FP8[quantizer.dtype][1]
    if name == "Float8Quantizer":  # delayed: the scale comes from earlier steps, and the largest value is kept for later ones
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.reshape(1)))
        return quantizer.scale.reshape(()).clone()
    if name != "Float8CurrentScalingQuantizer":
        raise NotImplementedError(name)
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    scale = torch.where(amax > 0, largest / amax.clamp(min=max(quantizer.amax_epsilon, _TINY)), 1.0)
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def dequantize(tensor, dtype):
    return _dense(tensor).to(_TORCH[dtype])


def fp8_transpose(data, dtype, out=None):
    width = data.shape[-1]
    result = data.reshape(-1, width).t().contiguous().reshape(width, *data.shape[:-1])
    return result if out is None else out.copy_(result)


def compute_amax(tensor, amax):
    amax.copy_(tensor.float().abs().max().reshape(amax.shape) if tensor.numel() else torch.zeros_like(amax))


def split_quantize(tensor, sizes, quantizers, **_):
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(sizes), quantizers, strict=True)]


# Products


def generic_gemm(
    A,
    transa,
    B,
    transb,
    D,
    quantizer,
    out_dtype,
    bias,
    bias_dtype,
    gelu,
    gelu_in,
    grad,
    workspace,
    workspace_size,
    accumulate,
    split_accumulator,
    comm_overlap=None,
    comm_type=None,
    extra_output=None,
    bulk_overlap=False,
    alpha=1.0,
    beta=None,
):
    """Return op(B) · op(A) in torch's row-major terms, as cuBLAS sees the same matrices by columns."""
    a, b = _dense(A), _dense(B)
    lead = b.shape[:-1]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    if _is_quantized(A) or _is_quantized(B):
        _check_fp8_sizes(a, b)
    product = alpha * ((b.t() if transb else b) @ (a.t() if transa else a))
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if not transb:
        product = product.reshape(*lead, product.shape[-1])
    return _written(product, D, out_dtype, quantizer, accumulate), bias_grad, gelu_in, extra_output


def _check_fp8_sizes(a, b):
    """Refuse what cuBLAS refuses on Hopper: dimensions of FP8 products are multiples of 16 (its manual, cublasLtMatmul)."""
    if a.shape[0] % 16 or a.shape[1] % 16 or b.shape[0] % 8 or b.shape[1] % 16:
        raise RuntimeError(f"FP8 product of sizes that cuBLAS refuses: {tuple(a.shape)} {tuple(b.shape)}")


def _written(product, D, out_dtype, quantizer, accumulate):
    if D is None:
        product = product.to(_TORCH[out_dtype]) if out_dtype is not None else product.to(torch.bfloat16)
        return quantize(product, quantizer)
    if accumulate:
        D.add_(product.reshape(D.shape).to(D.dtype))
    elif _is_quantized(D):
        quantize(product, quantizer, D)
    else:
        D.copy_(product.reshape(D.shape))
    return D


def te_general_grouped_gemm(
    A, transa, B, transb, D, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu, grad, workspaces, workspace_size,
    accumulate, split_accumulator, sm_count,
):  # fmt: skip
    """Compute one product after the other: experts' weights with the tokens of each."""
    outputs = D[0].split(m_splits) if single_output else D
    for a, b, out, add, into in zip(A, B, outputs, bias, bias, strict=True):
        if not b.numel():  # an expert without tokens
            if not accumulate:
                out.zero_()
            continue
        has_bias = add is not None and add.numel() > 0
        _, of_bias, *_ = generic_gemm(
            *(a, transa, b, transb, out, None, out_dtype, add if has_bias else None, bias_dtype, False, None, grad),
            *(None, 0, accumulate, split_accumulator),
        )
        if has_bias and grad:
            into.copy_(of_bias)
    return bias


# Norms, activations, positions


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    y = (wide * scale[:, None] * (weight.float() + (1 if zero_centered else 0))).to(_TORCH[dtype])
    if quantizer is not None:
        y = quantize(y, quantizer, out)
    elif out is not None:
        y = out.copy_(y)
    return y, None, scale


def rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered):
    wide, of_y = x.float().reshape(-1, x.shape[-1]), grad.float().reshape(-1, x.shape[-1])
    normal = wide * scale.reshape(-1, 1)
    of_weight = (of_y * normal).sum(0).to(weight.dtype)
    of_y = of_y * (weight.float() + (1 if zero_centered else 0))
    of_x = (of_y - normal * (of_y * normal).mean(-1, keepdim=True)) * scale.reshape(-1, 1)
    return of_x.to(x.dtype).reshape(x.shape), of_weight


layernorm_fwd = layernorm_bwd = rmsnorm_bwd_add = None  # looked up at import


def _rotated(x, angles, sign):
    """Rotate the first dimensions of each head, halves against each other; sign -1 turns back."""
    width = angles.shape[-1]
    turning, rest = x[..., :width].float(), x[..., width:].float()
    first, second = turning.chunk(2, -1)
    turned = turning * angles.cos() + sign * torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((turned, rest), -1).to(x.dtype)


def _angles_of_rows(freqs, cu_seqlens, cp_size, cp_rank, tokens):
    """Return the angles of a packed micro-batch, of which each row is cut into 2·ranks parts and a rank has two."""
    if cu_seqlens is None:
        raise NotImplementedError("rotary positions of rows that are not packed")
    parts, bounds = [], (cu_seqlens // cp_size).tolist()
    for start, end in itertools.pairwise(bounds):
        length = end - start
        if cp_size == 1:
            parts.append(freqs[:length])
            continue
        half = length // 2
        parts += [freqs[cp_rank * half : (cp_rank + 1) * half]]
        last = (2 * cp_size - cp_rank) * half
        parts += [freqs[last - half : last]]
    angles = torch.cat(parts)
    return torch.cat((angles, angles.new_zeros(tokens - len(angles), *angles.shape[1:]))).flatten(1)[:, None]


def fused_rope_forward(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotated(x, _angles_of_rows(freqs, cu_seqlens, cp_size, cp_rank, len(x)), 1)


def fused_rope_backward(grad, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotated(grad, _angles_of_rows(freqs, cu_seqlens, cp_size, cp_rank, len(grad)), -1)


# Experts


def fused_topk_with_score_function_fwd(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
):
    if num_groups or group_topk or score_function != "softmax" or expert_bias is not None:
        raise NotImplementedError("routing other than by softmax")
    scores = logits.float().softmax(-1) if use_pre_softmax else logits.float()
    top, chosen = scores.topk(topk, -1)
    weights = (top if use_pre_softmax else top.softmax(-1)) * (scaling_factor or 1.0)
    routing = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    probabilities = torch.zeros_like(scores).scatter(1, chosen, weights)
    return probabilities.to(logits.dtype), routing, (scores if use_pre_softmax else probabilities)


def fused_topk_with_score_function_bwd(
    tokens, experts, routing, intermediate, grad, topk, use_pre_softmax, scaling_factor, score_function
):
    grad = torch.where(routing, grad.float(), 0.0) * (scaling_factor or 1.0)
    weights = intermediate.float()  # a softmax, over all experts or over the chosen ones
    return (weights * (grad - (grad * weights).sum(-1, keepdim=True))).to(torch.float32)


def fused_multi_row_padding(values, out, rows, padded_rows):
    """Copy groups of rows, each to the beginning of a longer group whose other rows are zero."""
    for group, room in zip(values.split(rows), out.split(padded_rows), strict=True):
        room.zero_()[: len(group)].copy_(group)


def fused_multi_row_unpadding(values, out, padded_rows, rows):
    for room, group in zip(values.split(padded_rows), out.split(rows), strict=True):
        group.copy_(room[: len(group)])


# Attention over packed rows


def get_fused_attn_backend(
    training, q_type, kv_type, layout, bias, mask, softmax, dropout, heads, groups, max_q, max_kv, qk_dim, v_dim, left, right,
    return_max_logit=False, cuda_graph=False, deterministic=False,
):  # fmt: skip
    if qk_dim % 8 or v_dim % 8 or qk_dim > 256:
        return NVTE_Fused_Attn_Backend.NVTE_No_Backend
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def _rows(q, k, cu_q, cu_kv, padded_q, padded_kv, mask):
    """Return slices of the queries and the keys of each row, and whether attention is causal."""
    name = str(mask)
    if not name.endswith(("PADDING_CAUSAL_MASK", "PADDING_MASK")):
        raise NotImplementedError(f"attention mask {mask}")
    starts_q = (padded_q if padded_q is not None else cu_q).tolist()
    starts_k = (padded_kv if padded_kv is not None else cu_kv).tolist()
    if starts_q[-1] > len(q) or starts_k[-1] > len(k):
        raise RuntimeError(f"rows reach beyond their tensors: {starts_q[-1]} of {len(q)}, {starts_k[-1]} of {len(k)}")
    lengths = zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True)
    rows = [(slice(a, a + m), slice(b, b + n)) for a, b, (m, n) in zip(starts_q, starts_k, lengths, strict=False) if m]
    return rows, name.endswith("CAUSAL_MASK")


def _heads(x, repeats):
    """Repeat the heads of keys or values for the queries that share them, [tokens, heads, dim] in float32."""
    return x.float().repeat_interleave(repeats, 1)


def _scores(q, k, causal, scale):
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, float("-inf")) if causal else scores


def fused_attn_fwd(
    max_q, max_kv, training, scale, dropout, fast_zero, layout, bias, mask, softmax, window, cu_q, cu_kv, q, k, v, dtype,
    padded_q=None, padded_kv=None, *_, **__,
):  # fmt: skip
    rows, causal = _rows(q, k, cu_q, cu_kv, padded_q, padded_kv, mask)
    if any(a.stop - a.start > max_q or b.stop - b.start > max_kv for a, b in rows):
        raise RuntimeError(f"a row is longer than max_seqlen {max_q}, {max_kv}")
    out = torch.zeros(*q.shape[:2], v.shape[2], device=q.device)
    log_sums, repeats = torch.zeros(*q.shape[:2], 1, device=q.device), q.shape[1] // k.shape[1]
    for a, b in rows:
        scores = _scores(q[a].float(), _heads(k[b], repeats), causal, scale)
        log_sum = torch.logsumexp(scores, -1)
        out[a] = torch.einsum("hqk,khd->qhd", (scores - log_sum[..., None]).exp(), _heads(v[b], repeats))
        log_sums[a] = log_sum.t()[..., None]
    return [out.to(q.dtype), log_sums, torch.zeros(2, dtype=torch.int64, device=q.device)]


def fused_attn_bwd(
    max_q, max_kv, scale, dropout, fast_zero, layout, bias, mask, softmax, window, deterministic, cu_q, cu_kv, q, k, v, out,
    grad, dtype, grad_dtype, saved, padded_q=None, padded_kv=None, *_, **__,
):  # fmt: skip
    rows, causal = _rows(q, k, cu_q, cu_kv, padded_q, padded_kv, mask)
    of_q, of_k, of_v = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
    log_sums, repeats, grad, out = saved[0], q.shape[1] // k.shape[1], grad.float().reshape(out.shape), out.float()

    def folded(x):
        """Add up what the queries that share a head give it."""
        return x.reshape(len(x), -1, repeats, x.shape[2]).sum(2)

    for a, b in rows:
        keys, values = _heads(k[b], repeats), _heads(v[b], repeats)
        weights = (_scores(q[a].float(), keys, causal, scale) - log_sums[a, :, 0].t()[..., None]).exp()
        of_weights = torch.einsum("qhd,khd->hqk", grad[a], values)
        of_scores = weights * (of_weights - (grad[a] * out[a]).sum(-1).t()[..., None]) * scale
        of_q[a] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        of_k[b] = folded(torch.einsum("hqk,qhd->khd", of_scores, q[a].float()))
        of_v[b] = folded(torch.einsum("hqk,qhd->khd", weights, grad[a]))
    return [of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None, None]


# Context parallelism: a ring of ranks, each with two halves of every row


def _half(cu_seqlens, which):
    """Return the tokens of the first (0) or the second (1) half of each row."""
    bounds = itertools.pairwise(cu_seqlens.tolist())
    return torch.cat([torch.arange(a, b)[(b - a) // 2 * which :][: (b - a) // 2] for a, b in bounds]).to(cu_seqlens.device)


def thd_read_half_tensor(x, cu_seqlens, which):
    tokens = _half(cu_seqlens, which)
    return (x[:, tokens] if x.dim() == 4 else x[tokens]).contiguous()


def thd_read_second_half_lse(log_sums, cu_seqlens, packed, tokens):
    return log_sums[:, _half(cu_seqlens, 1)].contiguous()


def thd_second_half_lse_correction(log_sums, of_step, cu_seqlens, packed):
    tokens = _half(cu_seqlens, 1)
    log_sums[:, tokens] = torch.logaddexp(log_sums[:, tokens], of_step.to(log_sums.dtype))


def thd_out_correction(out, of_step, log_sums, log_sums_of_step, cu_seqlens, only_second_half, packed):
    tokens = _half(cu_seqlens, 1) if only_second_half else slice(None)
    share = (log_sums_of_step - log_sums[:, tokens]).exp().t()[..., None].float()
    out[tokens] = (out[tokens].float() + of_step.float().reshape(out[tokens].shape) * share).to(out.dtype)


def thd_grad_correction(grad, of_step, cu_seqlens, first, second):
    of_both = first != "none" and second != "none"
    for which, how in enumerate((first, second)):
        if how == "none":
            continue
        tokens = _half(cu_seqlens, which)
        at = (slice(None), tokens) if grad.dim() == 4 else (tokens,)
        part = of_step[at] if of_both else of_step
        grad[at] = (grad[at] + part if how == "add" else part).to(grad.dtype)


# What optimizers apply to many tensors


def multi_tensor_scale(chunk, noop, lists, scale):
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), (norms if per_tensor else norms.new_zeros(0))


def multi_tensor_unscale_l2norm(chunk, noop, lists, inverse_scale, per_tensor=False):
    return multi_tensor_l2norm(chunk, noop, [[tensor * inverse_scale for tensor in lists[0]]], per_tensor)


def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    for grad, parameter, first, second in zip(*lists, strict=True):
        grad = grad.float()
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if mode == 1:  # AdamW
            parameter.mul_(1 - lr * decay)
        parameter.addcdiv_(first / correction1, (second / correction2).sqrt() + eps, value=-lr)


def multi_tensor_compute_scale_and_scale_inv(chunk, noop, lists, largest, power_of_2=False, eps=0.0):
    for amax, scale, inverse in zip(*lists, strict=True):
        new = torch.where(amax > 0, largest / amax.clamp(min=max(eps, _TINY)), torch.ones_like(amax))
        scale.copy_((torch.exp2(torch.floor(torch.log2(new))) if power_of_2 else new).reshape(scale.shape))
        inverse.copy_(scale.reciprocal().reshape(inverse.shape))


def fused_amax_and_scale_update_after_reduction(amaxes, histories, scales, algorithm, dtype, margin):
    largest, used = _FP8[dtype][1], 0
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(amaxes[used : used + history.shape[1]])
        used += history.shape[1]
        amax = history.amax(0) if algorithm == "max" else history[0]
        new = torch.where(amax > 0, largest / amax / 2**margin, scale)
        scale.copy_(torch.where(torch.isfinite(new), new, scale))
        history.copy_(torch.roll(history, -1, 0))
        history[0].zero_()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"transformer_engine_torch.{name} is not written in tests/fake_gpu")

    missing.__name__ = name
    return missing
