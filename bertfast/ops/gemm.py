"""C = A B in bf16, summed in fp32, or in fp32: the products of a linear layer, forward and backward.

a: (M, K), or (K, M) if transpose_a   b: (K, N), or (N, K) if transpose_b   bias: (N,) or None   C: (M, N)
    forward y = x W^T + bias     input's gradient dx = dy W     weight's gradient dW = dy^T x
The kernel is there for x86-64 CPUs with AVX-512, in bf16 for those of them that multiply it by vdpbf16ps; `suits` says
where it is the one to take. In fp32 the weight's gradient, whose operands both would have to be packed, is PyTorch's.
Blocks and packing follow Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
"""

import functools

import torch
from torch import Tensor

from ._define import define

MOST_ELEMENTS = 1 << 24  # of x, which the weight's gradient packs as a whole: 32 MiB


def gemm_of_pytorch(a, b, bias, transpose_a, transpose_b):
    a, b = a.mT if transpose_a else a, b.mT if transpose_b else b
    return a @ b if bias is None else torch.addmm(bias, a, b)


gemm = define("gemm(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor",
              gemm_of_pytorch, cpu_only=True)
gemm.__doc__ = """C out of a, b, bias, transpose_a and transpose_b, by position; shapes above, one dtype.

Raises RuntimeError under autograd; where the kernel is there also for shapes that do not fit, an N no multiple of 64,
an odd K, and a transposed a beside a transposed b or a bias; TypeError for operands of several dtypes.
"""


@functools.cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel is there for this dtype; where there is AMX, oneDNN's bf16 has more to offer."""
    there = torch._C._dispatch_has_kernel_for_dispatch_key("bertfast::gemm", "CPU")
    if dtype == torch.bfloat16:
        return there and torch.ops.bertfast.gemm_multiplies_bf16() and not torch.cpu._is_amx_tile_supported()
    return there and dtype == torch.float32


@functools.cache
def takes_few_rows() -> bool:
    """Whether in fp32 it is faster than PyTorch's below 256 rows too: on Intel's CPUs; on AMD's it is not."""
    return _has_kernel(torch.float32) and torch.ops.bertfast.gemm_takes_few_rows()


def _least_rows(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bfloat16 else 48 if takes_few_rows() else 256


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes a linear layer of x (M, I) with weight (O, I), and its gradients."""
    return (
        type(weight) in (torch.nn.Parameter, torch.Tensor)  # a subclass has its own ways
        and x.dtype == weight.dtype and x.device.type == "cpu" and x.dim() == 2
        and not torch.compiler.is_compiling() and _has_kernel(x.dtype)
        and x.shape[1] % 64 == 0 and weight.shape[0] % 64 == 0
        and len(x) >= _least_rows(x.dtype) and 0 < x.numel() <= MOST_ELEMENTS
        and not torch.is_autocast_enabled("cpu")
    )
