"""Linear layers: which GEMM computes them, and several of one input as one, with their own parameters.

x: (T, H)   weights: n of (O, H)   biases: n of (O,)   y: (T, n * O)
The GEMM is `gemm` where it suits, `few_rows_linear` for inference on few rows, else PyTorch's (oneDNN, cuBLAS).
The second layer of a feed-forward block takes x before its GELU and on CPUs keeps no other input for the backward:
GELU's output, a quarter of all that a step would keep, is formed again there (recomputation, Chen et al. 2016).
Parameters that lie one after another in one storage (bertfast.optim lays them out so) are read in place; others are
joined by a copy, or in inference on few rows, where copying the weights takes longer, the results are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._define import node, once_differentiable
from .bias_gelu import bias_gelu, bias_gelu_bwd, bias_gelu_fwd
from .few_rows_linear import few_rows_linear, takes
from .gemm import gemm, gemm_of_pytorch, suits


def _adjacent(tensors: list[Tensor]) -> bool:
    """Whether they lie one after another in one storage."""
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return False
    first = tensors[0]
    end = first.data_ptr()
    for t in tensors:
        if t.data_ptr() != end or not t.is_contiguous() or t.dtype != first.dtype:
            return False
        end += t.numel() * t.element_size()
    storage = first.untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()  # else neighbours by chance, in storages of their own


def _joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one under another, as a view where memory already has them so."""
    if len(tensors) == 1:
        return tensors[0]
    if not _adjacent(tensors):
        return torch.cat(tensors)
    columns = tensors[0].shape[1:]
    return tensors[0].as_strided((sum(t.shape[0] for t in tensors), *columns), (*columns, 1))


def _gemm(own: bool) -> Callable[..., Tensor]:
    return gemm if own else gemm_of_pytorch


class _Linear(torch.autograd.Function):
    """n Linear layers of x: their weights, then their biases or none. own: by `gemm`."""

    @staticmethod
    def forward(ctx, x, own, n, *parameters):
        weights, biases = list(parameters[:n]), list(parameters[n:])
        ctx.save_for_backward(x, *weights)
        ctx.has_bias, ctx.own = bool(biases), own
        return _gemm(ctx.own)(x, _joined(weights), _joined(biases) if biases else None, False, True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        multiply, dy = _gemm(ctx.own), dy.contiguous() if ctx.own else dy  # once for both products
        n, dx = len(weights), None
        dweight: tuple[Tensor | None, ...] = (None,) * n
        if ctx.needs_input_grad[0]:
            dx = multiply(dy, _joined(weights), None, False, False)
        if any(ctx.needs_input_grad[3 : 3 + n]):
            dweight = multiply(dy, x, None, True, False).chunk(n)
        dbias = dy.sum(0).chunk(n) if ctx.has_bias else ()
        return dx, None, None, *dweight, *dbias


class _GeluLinear(torch.autograd.Function):
    """A Linear layer of GELU(x + bias), without a bias of its own, that keeps x alone."""

    @staticmethod
    def forward(ctx, x, bias, weight, own):
        ctx.save_for_backward(x, bias, weight)
        ctx.own = own
        return _gemm(ctx.own)(bias_gelu_fwd(x, bias), weight, None, False, True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias, weight = ctx.saved_tensors
        multiply, dy = _gemm(ctx.own), dy.contiguous() if ctx.own else dy
        dweight = multiply(dy, bias_gelu_fwd(x, bias), None, True, False)
        return *bias_gelu_bwd(multiply(dy, weight, None, False, False), x, bias), dweight, None


_linear = node("linear", lambda x, weights, biases, own: _Linear.apply(x, own, len(weights), *weights, *biases))
_gelu_linear = node("gelu_linear", _GeluLinear.apply)


def _forms_again(x: Tensor, module: nn.Linear) -> bool:
    """Whether GELU's output is to be formed again: on CPUs its pass is lost in the time of the GEMMs."""
    return (
        x.device.type == "cpu" and torch.is_grad_enabled() and module.weight.requires_grad
        and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    )


def is_plain(module: nn.Module, cls: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is a `cls` whose weight and bias say all: no adapter, parametrisation, hook or missing bias."""
    return type(module) is cls and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__ or module._parameters.get("bias", module) is None
    )


def linear(x: Tensor, module: nn.Linear, gelu_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`F.linear(x, module.weight)`, or `F.linear(GELU(x + gelu_bias), module.weight)`, and the bias to be added to it.

    x: (M, I), gelu_bias: (I,), same dtype; returns (M, O) and (O,). What is not a plain Linear layer (LoRA, hooks,
    quantised) is called and adds a bias itself: zeros are left to add.
    """
    if not is_plain(module):
        y = module(x if gelu_bias is None else bias_gelu(x, gelu_bias))
        return y, y.new_zeros(y.shape[-1])
    weight, bias = module.weight, module.bias
    if gelu_bias is not None:
        if _forms_again(x, module):
            return _gelu_linear(x, gelu_bias, weight, suits(x, weight)), bias
        x = bias_gelu(x, gelu_bias)
    if takes(x, module):
        return few_rows_linear(x, [weight], []), bias
    return _linear(x, [weight], [], True) if suits(x, weight) else F.linear(x, weight), bias


def joined_linear(x: Tensor, *linears: nn.Linear) -> Tensor:
    """`torch.cat([linear(x) for linear in linears], -1)` in one GEMM, for Linear layers of one shape, with bias."""
    if not all(map(is_plain, linears)):
        return torch.cat([m(x) for m in linears], -1)
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    if takes(x, linears[0]):
        return few_rows_linear(x, weights, biases)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # a traced length must not decide anything
        if 2 * len(x) < x.shape[1] and not _adjacent(weights):
            return torch.cat([torch.addmm(b, x, w.t()) for w, b in zip(weights, biases)], 1)
    return _linear(x, weights, biases, suits(x, weights[0]))
