"""y = GELU(x + bias), the exact erf form: z * Phi(z) with Phi the normal distribution function.

x, y: (T, I)   bias: (I,)
dx = dy * (Phi(z) + z * phi(z)),   dbias = sum over rows of dx      (Hendrycks & Gimpel 2016; BERT uses erf)
"""

import math

import torch
from torch import Tensor

from ._define import accumulate_dtype, define, once_differentiable


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.erf(z * math.sqrt(0.5)))


def gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
    return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _forward(x, bias):
    acc = accumulate_dtype(x)
    return gelu(x.to(acc) + bias.to(acc)).to(x.dtype)


def _backward(dy, x, bias):
    acc = accumulate_dtype(x)
    dz = dy.to(acc) * gelu_derivative(x.to(acc) + bias.to(acc))
    return dz.to(x.dtype), dz.sum(0).to(bias.dtype)


bias_gelu_fwd = define("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor", _forward, kernels="bias_gelu")
bias_gelu_bwd = define("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)", _backward,
                       kernels="bias_gelu")


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return bias_gelu_fwd(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return bias_gelu_bwd(dy, *ctx.saved_tensors)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(x + bias)` in one pass. x: (T, I), bias: (I,), same dtype; returns (T, I) in x's dtype."""
    return _BiasGelu.apply(x, bias)
