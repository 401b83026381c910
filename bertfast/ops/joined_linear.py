"""Several Linear layers of one input as one GEMM: query, key and value keep their own parameters.

x: (T, H)   weights: n of (O, H)   biases: n of (O,)   y: (T, n * O)
Parameters that lie one after another in one storage (bertfast.optim lays them out so) are read in place; others are
joined by a copy. Not an op of the dispatcher: the GEMMs are oneDNN's and cuBLAS's.
"""

import torch
from torch import Tensor


def _joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one under another, as a view where memory already has them so."""
    first = tensors[0]
    if torch.compiler.is_compiling():  # a traced tensor has no address
        return torch.cat(tensors)
    end = first.data_ptr()
    for t in tensors:
        if t.data_ptr() != end or not t.is_contiguous() or t.dtype != first.dtype:
            return torch.cat(tensors)
        end += t.numel() * t.element_size()
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance, in storages of their own
        return torch.cat(tensors)
    return first.as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


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
    return _JoinedLinear.apply(x, *(m.weight for m in linears), *(m.bias for m in linears))
