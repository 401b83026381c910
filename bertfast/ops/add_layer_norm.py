"""y = LayerNorm(dropout(x + bias) + residual): the tail of every post-LN BERT sub-layer.

x, residual, z, y: (T, H)   bias, weight, ln_bias: (H,)   mean, rstd: (T,) float32   row_key: (T,) int64
z = dropout(x + bias) + residual     x_hat = (z - mean) * rstd     y = x_hat * weight + ln_bias

backward (c1, c2 are row means):
  g = dy * weight    c1 = mean(g)    c2 = mean(g * x_hat)    dz = rstd * (g - c1 - c2 * x_hat)
  dresidual = dz     dx = dropout'(dz)    dbias = sum(dx)    dweight = sum(dy * x_hat)    dln_bias = sum(dy)
"""

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, distinct, node, once_differentiable
from .dropout import dropout_scale, require_seed


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of z in z's own dtype (Ba et al. 2016), two passes for the variance; returns y, mean, rstd."""
    mean = z.mean(-1)
    centred = z - mean.unsqueeze(-1)
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    return centred * rstd.unsqueeze(-1) * weight + bias, mean, rstd


def layer_norm_backward(dy, z, mean, rstd, weight) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dweight, dbias of `layer_norm`; everything in z's dtype."""
    x_hat = (z - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    g = dy * weight
    c1, c2 = g.mean(-1, keepdim=True), (g * x_hat).mean(-1, keepdim=True)
    return (g - c1 - c2 * x_hat) * rstd.unsqueeze(-1), (dy * x_hat).sum(0), dy.sum(0)


def _add_layer_norm_fwd(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream):
    acc = accumulate_dtype(x)
    h = x.to(acc) if bias is None else x.to(acc) + bias.to(acc)
    z = (dropout_scale(h, p, seed, row_key, stream) + residual.to(acc)).to(x.dtype)
    y, mean, rstd = layer_norm(z.to(acc), weight.to(acc), ln_bias.to(acc), eps)
    return y.to(x.dtype), z, mean, rstd


def _add_layer_norm_bwd(dy, z, mean, rstd, weight, p, seed, row_key, stream):
    acc = accumulate_dtype(z)
    dz, dweight, dln_bias = layer_norm_backward(dy.to(acc), z.to(acc), mean, rstd, weight.to(acc))
    dx = dropout_scale(dz, p, seed, row_key, stream)
    dbias = dx.sum(0)
    # without dropout dx is dz: one tensor, since an op may not return the same storage twice
    dx = dx.to(z.dtype) if p > 0.0 else z.new_empty(0, z.shape[1])
    return dz.to(z.dtype), dx, *(g.to(weight.dtype) for g in (dbias, dweight, dln_bias))


_fwd = define(
    "add_layer_norm_fwd(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, float p, "
    "Tensor? seed, Tensor? row_key, int stream) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)",
    _add_layer_norm_fwd,
    kernels="add_layer_norm",
)
_bwd = define(
    "add_layer_norm_bwd(Tensor dy, Tensor z, Tensor mean, Tensor rstd, Tensor weight, float p, Tensor? seed, "
    "Tensor? row_key, int stream) -> (Tensor dz, Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)",
    _add_layer_norm_bwd,
    kernels="add_layer_norm",
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream):
        y, z, mean, rstd = _fwd(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream)
        ctx.save_for_backward(z, mean, rstd, weight, seed, row_key)
        ctx.has_bias, ctx.p, ctx.stream = bias is not None, p, stream
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, mean, rstd, weight, seed, row_key = ctx.saved_tensors
        dz, dx, dbias, dweight, dln_bias = _bwd(dy, z, mean, rstd, weight, ctx.p, seed, row_key, ctx.stream)
        dx = dx if ctx.p > 0.0 else dz
        return dx, dbias if ctx.has_bias else None, dz, dweight, dln_bias, None, None, None, None, None


_differentiable = node("add_layer_norm", _AddLayerNorm.apply)


def add_layer_norm(x, bias, residual, weight, ln_bias, eps=1e-12, p=0.0, seed=None, row_key=None, stream=0) -> Tensor:
    """`F.layer_norm(F.dropout(x + bias, p) + residual, (H,), weight, ln_bias, eps)` in one pass.

    x, residual: (T, H); bias (or None), weight, ln_bias: (H,); returns (T, H) in x's dtype, statistics in fp32.
    p, seed, row_key, stream: see bertfast.ops.dropout; row_key None counts rows. Raises ValueError for p outside
    [0, 1) or p > 0 without a seed.
    """
    if p > 0.0:
        require_seed(seed)
    x, residual = distinct(x, residual)
    return _differentiable(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream)
