"""C = A B in bf16, summed in fp32: the products of a linear layer, forward and backward.

a: (M, K), or (K, M) if transpose_a   b: (K, N), or (N, K) if transpose_b   bias: (N,) or None   C: (M, N)
    forward y = x W^T + bias     input's gradient dx = dy W     weight's gradient dW = dy^T x
The kernel is there for x86-64 CPUs that multiply bf16 by vdpbf16ps; `suits` says where it is the one to take. Blocks
and packing follow Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
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


@functools.cache
def _has_kernel() -> bool:
    """Whether the C++ kernel is there; where there is AMX, oneDNN has more to offer."""
    there = torch._C._dispatch_has_kernel_for_dispatch_key("bertfast::gemm", "CPU")
    return there and not torch.cpu._is_amx_tile_supported()


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel computes a linear layer of x (M, I) with weight (O, I), and its gradients."""
    return (
        type(weight) in (torch.nn.Parameter, torch.Tensor)  # a subclass has its own ways
        and x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu" and x.dim() == 2
        and not torch.compiler.is_compiling() and _has_kernel()
        and x.shape[1] % 64 == 0 and weight.shape[0] % 64 == 0 and 0 < x.numel() <= MOST_ELEMENTS
        and not torch.is_autocast_enabled("cpu")
    )
