"""y = LayerNorm(GELU(x + bias)): the transform of the masked-language-model head.

x, y: (P, H)   bias, weight, ln_bias: (H,)   mean, rstd: (P,) float32
The backward is LayerNorm's into dg, then GELU's: dx = dg * GELU'(x + bias), dbias = sum(dx).
"""

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, once_differentiable
from .add_layer_norm import layer_norm, layer_norm_backward
from .bias_gelu import gelu, gelu_derivative


def _gelu_layer_norm_fwd(x, bias, weight, ln_bias, eps):
    acc = accumulate_dtype(x)
    y, mean, rstd = layer_norm(gelu(x.to(acc) + bias.to(acc)), weight.to(acc), ln_bias.to(acc), eps)
    return y.to(x.dtype), mean, rstd


def _gelu_layer_norm_bwd(dy, x, bias, weight, mean, rstd):
    acc = accumulate_dtype(x)
    z = x.to(acc) + bias.to(acc)
    dg, dweight, dln_bias = layer_norm_backward(dy.to(acc), gelu(z), mean, rstd, weight.to(acc))
    dx = dg * gelu_derivative(z)
    return dx.to(x.dtype), *(g.to(weight.dtype) for g in (dx.sum(0), dweight, dln_bias))


_fwd = define(
    "gelu_layer_norm_fwd(Tensor x, Tensor bias, Tensor weight, Tensor ln_bias, float eps) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _gelu_layer_norm_fwd,
    kernels="gelu_layer_norm",
)
_bwd = define(
    "gelu_layer_norm_bwd(Tensor dy, Tensor x, Tensor bias, Tensor weight, Tensor mean, Tensor rstd) "
    "-> (Tensor dx, Tensor dbias, Tensor dweight, Tensor dln_bias)",
    _gelu_layer_norm_bwd,
    kernels="gelu_layer_norm",
)


class _GeluLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight, ln_bias, eps):
        y, mean, rstd = _fwd(x, bias, weight, ln_bias, eps)
        ctx.save_for_backward(x, bias, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_bwd(dy, *ctx.saved_tensors), None


def gelu_layer_norm(x: Tensor, bias: Tensor, weight: Tensor, ln_bias: Tensor, eps: float = 1e-12) -> Tensor:
    """`F.layer_norm(F.gelu(x + bias), (H,), weight, ln_bias, eps)` in one pass; shapes above, x's dtype out."""
    return _GeluLayerNorm.apply(x, bias, weight, ln_bias, eps)
