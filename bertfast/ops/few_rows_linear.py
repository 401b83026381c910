"""y = [x W_1^T + b_1, x W_2^T + b_2, …]: Linear layers of one input on few rows, in inference.

x: (M, I)   weights: n of (O, I)   biases: n of (O,), or none   y: (M, n * O)
With few rows the time is that of reading the weights, which a library's GEMM spends packing them. More rows, gradients,
tracing and other devices stay with other GEMMs (bertfast.ops.linear): `takes` decides.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._define import define, forward_mode
from .gemm import takes_few_rows

MOST_ROWS = 128  # times PyTorch's GEMM there, measured: AMD's AVX-512 1.5 in fp32, 1.1 in bf16; AVX2 1.0 to 1.2


def _few_rows_linear(x, weights, biases):
    padded = list(biases) or [None] * len(weights)
    return torch.cat([F.linear(x, w, b) for w, b in zip(weights, padded, strict=True)], 1)


few_rows_linear = define("few_rows_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor", _few_rows_linear,
                         cpu_only=True)
few_rows_linear.__doc__ = """y out of x, weights and biases, by position; shapes above, one dtype.

Raises RuntimeError under autograd; where the kernel is there also for shapes that do not fit, an I no multiple of 32,
an O none of 4; TypeError for operands of several dtypes.
"""


@functools.cache
def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel is there for this dtype; where there is AMX, oneDNN's bf16 has more to offer."""
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    there = torch._C._dispatch_has_kernel_for_dispatch_key("bertfast::few_rows_linear", "CPU")
    return there and dtype in (torch.float32, torch.bfloat16)


def most_rows(dtype: torch.dtype) -> int:
    """How many rows the kernel is the one to take: where `gemm` is as good in its place, to where `gemm` always is."""
    return 255 if dtype == torch.float32 and takes_few_rows() else MOST_ROWS


def takes(x: Tensor, module: nn.Linear) -> bool:
    """Whether the kernel computes this layer, in evaluation, of x (M, I).

    In training never: gradient checkpointing runs a layer without and with gradients, and compares bits.
    """
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_mode():
        return False
    weight = module.weight
    if type(weight) not in (nn.Parameter, torch.Tensor):  # quantised, say: a subclass has its own ways
        return False
    return (
        x.device.type == "cpu" and x.dim() == 2 and len(x) <= most_rows(x.dtype) and x.shape[1] % 32 == 0
        and weight.shape[0] % 4 == 0 and x.dtype == weight.dtype and _has_kernel(x.dtype)
        and not torch.is_autocast_enabled("cpu")
    )
