"""out = dropout(softmax(scale * Q K^T + mask)) V, over sequences packed one after another (varlen).

q, out: (Tq, N, D)   k, v: (Tk, N, D), any strides with a contiguous last dimension
cu_seqlens_q, cu_seqlens_k: (B+1,) int32, where sequence b has rows cu[b]..cu[b+1]   lse: (N, Tq) float32
mask_mode 0: every query sees all keys of its sequence; 1: causal, keys up to the query's position; 2: prefix-LM,
causal plus the first prefix_lens[b] keys (UniLM, Dong et al. 2019). A query's position is the low word of its
q_row_key, so that a subset of the queries is exact; without row keys it counts from the sequence's start.

Only lse (log sum exp of the scaled scores) is saved for the backward, which recomputes P (FlashAttention, Dao et
al. 2022):  P = exp(scale * QK^T - lse)   M = keep mask / P(kept)   delta = rowsum(dout * out)
            dv = (P * M)^T dout    dS = P * (M * (dout v^T) - delta)    dq = scale * dS k    dk = scale * dS^T q
Rows at or after cu_seqlens_q[-1], and rows that see no key, give zeros forward and backward, and lse = +inf there,
so that P is 0.
"""

import math

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, distinct, node, once_differentiable
from .dropout import keep_mask, keep_scale, require_seed

MOST_HEADS = 256  # in the low byte of a counter's word, below the stream
MASK_MODES = {"full": 0, "causal": 1, "prefix": 2}
HEAD_SIZES = range(16, 129)  # that the kernels for GPUs take


def _sequences(q, k, cu_seqlens_q, cu_seqlens_k, mask_mode, prefix_lens, p, seed, q_row_key, stream):
    """For each sequence: its query rows, key rows, visible (Sq, Sk) bool and the dropout multiplier (N, Sq, Sk)."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows_q, rows_k = slice(bounds_q[b], bounds_q[b + 1]), slice(bounds_k[b], bounds_k[b + 1])
        n_q, n_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        if q_row_key is None:
            row_key = (b << 32) + torch.arange(n_q, device=q.device)
        else:
            row_key = q_row_key[rows_q]
        column = torch.arange(n_k, device=q.device)
        visible = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device)
        if mask_mode != 0:
            visible = column <= (row_key & 0xFFFFFFFF).unsqueeze(1)
        if mask_mode == 2:
            visible = visible | (column < prefix_lens[b])
        multiplier = None
        if p > 0.0:
            mask = keep_mask(p, require_seed(seed), row_key, n_k, stream, q.shape[1])
            multiplier = mask.to(accumulate_dtype(q)) * keep_scale(p)
        yield rows_q, rows_k, visible, multiplier


def _scores(q, k, visible, scale):
    """(N, Sq, Sk), masked, in the accumulation dtype; q: (N, Sq, D), k: (N, Sk, D)."""
    return (q @ k.mT * scale).masked_fill(~visible, -math.inf)


def _attention_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p, seed, q_row_key, stream
):
    acc = accumulate_dtype(q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), math.inf, dtype=acc, device=q.device)
    for rows_q, rows_k, visible, multiplier in _sequences(
        q, k, cu_seqlens_q, cu_seqlens_k, mask_mode, prefix_lens, p, seed, q_row_key, stream
    ):
        qs, ks, vs = (t.transpose(0, 1).to(acc) for t in (q[rows_q], k[rows_k], v[rows_k]))
        scores = _scores(qs, ks, visible, scale)
        total = torch.logsumexp(scores, -1)
        lse[:, rows_q] = total.masked_fill(total == -math.inf, math.inf)
        probabilities = torch.exp(scores - lse[:, rows_q].unsqueeze(-1))
        if multiplier is not None:
            probabilities = probabilities * multiplier
        out[rows_q] = (probabilities @ vs).transpose(0, 1).to(q.dtype)
    return out, lse


def _attention_bwd(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p, seed,
    q_row_key, stream,
):
    acc = accumulate_dtype(q)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.zeros((k.shape[0], 2, *k.shape[1:]), dtype=k.dtype, device=q.device)
    for rows_q, rows_k, visible, multiplier in _sequences(
        q, k, cu_seqlens_q, cu_seqlens_k, mask_mode, prefix_lens, p, seed, q_row_key, stream
    ):
        tensors = (q[rows_q], k[rows_k], v[rows_k], dout[rows_q], out[rows_q])
        qs, ks, vs, dos, os = (t.transpose(0, 1).to(acc) for t in tensors)
        probabilities = torch.exp(_scores(qs, ks, visible, scale) - lse[:, rows_q].unsqueeze(-1))
        dp = dos @ vs.mT
        dropped = probabilities
        if multiplier is not None:
            dp, dropped = dp * multiplier, probabilities * multiplier
        ds = probabilities * (dp - (dos * os).sum(-1, keepdim=True)) * scale
        dq[rows_q] = (ds @ ks).transpose(0, 1).to(q.dtype)
        dkv[rows_k, 0] = (ds.mT @ qs).transpose(0, 1).to(k.dtype)
        dkv[rows_k, 1] = (dropped.mT @ dos).transpose(0, 1).to(k.dtype)
    return dq, dkv


def _attention_packed_bwd(dout, q, *rest):
    dq, dkv = _attention_bwd(dout, q, *rest)
    return torch.cat([dq.unsqueeze(1), dkv], 1)


def _fake_fwd(q, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q))


def _fake_bwd(dout, q, k, *rest):
    return q.new_empty(q.shape), k.new_empty((k.shape[0], 2, *k.shape[1:]))


def _fake_packed_bwd(dout, q, *rest):
    return q.new_empty((q.shape[0], 3, *q.shape[1:]))


_LAYOUT = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_q, int max_k, float scale, int mask_mode, Tensor? prefix_lens, "
    "float p, Tensor? seed, Tensor? q_row_key, int stream"
)
_SAVED = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"
_fwd = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor out, Tensor lse)",
    _attention_fwd, _fake_fwd, kernels="attention",
)
# dk and dv come in one (Tk, 2, N, D) tensor, and in packed form dq, dk, dv in one (T, 3, N, D): the gradient of a
# fused key-value or query-key-value projection, which the next GEMM reads without a copy.
_bwd = define(
    f"attention_bwd({_SAVED}, {_LAYOUT}) -> (Tensor dq, Tensor dkv)",
    _attention_bwd, _fake_bwd, kernels="attention",
)
_packed_bwd = define(
    f"attention_packed_bwd({_SAVED}, {_LAYOUT}) -> Tensor dqkv",
    _attention_packed_bwd, _fake_packed_bwd, kernels="attention",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p, seed,
                q_row_key, stream):
        out, lse = _fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p, seed,
                        q_row_key, stream)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, prefix_lens, seed, q_row_key)
        ctx.constants = max_q, max_k, scale, mask_mode, p, stream
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, prefix_lens, seed, q_row_key = ctx.saved_tensors
        max_q, max_k, scale, mask_mode, p, stream = ctx.constants
        dq, dkv = _bwd(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode,
                       prefix_lens, p, seed, q_row_key, stream)
        dk, dv = dkv.unbind(1)
        return dq, dk, dv, *(None,) * 11


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, scale, mask_mode, prefix_lens, p, seed, row_key, stream):
        q, k, v = qkv.unbind(1)
        out, lse = _fwd(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, mask_mode, prefix_lens, p,
                        seed, row_key, stream)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, prefix_lens, seed, row_key)
        ctx.constants = max_seqlen, scale, mask_mode, p, stream
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, out, lse, cu_seqlens, prefix_lens, seed, row_key = ctx.saved_tensors
        max_seqlen, scale, mask_mode, p, stream = ctx.constants
        q, k, v = qkv.unbind(1)
        dqkv = _packed_bwd(dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, mask_mode,
                           prefix_lens, p, seed, row_key, stream)
        return dqkv, *(None,) * 9


_differentiable_packed = node("attention_packed", _AttentionPacked.apply)


def attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *, scale=None, mask_mode="full", prefix_lens=None, p=0.0,
    seed=None, q_row_key=None, stream=0,
) -> Tensor:
    """`F.scaled_dot_product_attention` over packed sequences, queries and keys each with their own lengths.

    q: (Tq, N, D); k, v: (Tk, N, D); cu_seqlens_q, cu_seqlens_k: (B+1,) int32; max_q, max_k: longest sequence, a
    constant of the phase; scale: 1/sqrt(D) by default; mask_mode: "full", "causal" or "prefix" (then prefix_lens
    (B,) int32); p, seed, stream: see bertfast.ops.dropout; q_row_key: (Tq,) int64. Returns (Tq, N, D) in q's dtype.
    Raises ValueError for an unknown mask_mode, prefix without prefix_lens, dropout without a seed or of over 256 heads.
    """
    mode, scale = _check(mask_mode, prefix_lens, scale, q, p, seed)
    q, k, v = distinct(q, k, v)
    cu_seqlens_q, cu_seqlens_k = distinct(cu_seqlens_q, cu_seqlens_k)
    return _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mode, prefix_lens, p, seed,
                            q_row_key, stream)


def attention_packed(
    qkv, cu_seqlens, max_seqlen, *, scale=None, mask_mode="full", prefix_lens=None, p=0.0, seed=None, row_key=None,
    stream=0,
) -> Tensor:
    """Self-attention of a fused projection qkv (T, 3, N, D), read in place; its gradient is one (T, 3, N, D) tensor.

    Otherwise as `attention`. Returns (T, N, D).
    """
    mode, scale = _check(mask_mode, prefix_lens, scale, qkv, p, seed)
    return _differentiable_packed(qkv, cu_seqlens, max_seqlen, scale, mode, prefix_lens, p, seed, row_key, stream)


def _check(mask_mode, prefix_lens, scale, q, p, seed) -> tuple[int, float]:
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode must be one of {', '.join(MASK_MODES)}, got {mask_mode!r}")
    if mask_mode == "prefix" and prefix_lens is None:
        raise ValueError('mask_mode="prefix" needs prefix_lens, the visible length of each sequence')
    if p > 0.0:
        require_seed(seed)
        if q.shape[-2] > MOST_HEADS:
            raise ValueError(f"dropout tells {MOST_HEADS} heads apart, not {q.shape[-2]}")
    return MASK_MODES[mask_mode], q.shape[-1] ** -0.5 if scale is None else float(scale)
