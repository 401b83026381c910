"""Several Linear layers of one input as one GEMM: query, key and value keep their own parameters.

x: (T, H)   weights: n of (O, H)   biases: n of (O,)   y: (T, n * O)
Parameters that lie one after another in one storage (bertfast.optim lays them out so) are read in place; others are
joined by a copy, or in inference on few rows, where copying the weights takes longer, the results are. Not an op of the
dispatcher: the GEMMs are oneDNN's and cuBLAS's, on few rows that of few_rows_linear.
"""

import torch
from torch import Tensor

from .few_rows_linear import few_rows_linear, takes


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
    if not _adjacent(tensors):
        return torch.cat(tensors)
    return tensors[0].as_strided((sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]), tensors[0].stride())


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        n = len(parameters) // 2
        ctx.save_for_backward(x, *parameters[:n])
        return torch.addmm(_joined(list(parameters[n:])), x, _joined(list(parameters[:n])).t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dx = dy @ _joined(weights) if ctx.needs_input_grad[0] else None
        return dx, *(dy.t() @ x).chunk(len(weights)), *dy.sum(0).chunk(len(weights))


def joined_linear(x: Tensor, *linears: torch.nn.Linear) -> Tensor:
    """`torch.cat([linear(x) for linear in linears], -1)` in one GEMM, for Linear layers of one shape, with bias."""
    weights, biases = [m.weight for m in linears], [m.bias for m in linears]
    if takes(x, linears[0]):
        return few_rows_linear(x, weights, biases)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):  # a traced length must not decide anything
        if 2 * len(x) < x.shape[1] and not _adjacent(weights):
            return torch.cat([torch.addmm(b, x, w.t()) for w, b in zip(weights, biases)], 1)
    return _JoinedLinear.apply(x, *weights, *biases)
