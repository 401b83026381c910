"""y = GELU(x + bias), exact, not tanh's, and its gradient: one read and one write of each (T, I) tensor.

The backward's programs keep the sum of dx over their rows in registers; a second stage adds them in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .hardware import backward_programs, tuned
from .rows import STAGES, check_matrix, check_shapes, store_partial, sum_partials

COLUMNS = 512  # of a tile: two warps of 16-byte accesses
TILE = (4, 4)  # its rows and warps


@triton.jit
def normal(z):
    """Phi(z), within 2e-7, and exp(-z^2 / 2); a third of the instructions of erf, which would take longer than memory.

    Phi(-|z|) = exp(-z^2 / 2) P(1 / (1 + 0.27 |z|)), P of degree 6, minimax for the absolute error of z Phi(z).
    """
    e = tl.exp2(z * z * -0.7213475204444817)
    t = 1.0 / (1.0 + 0.27 * tl.abs(z))
    q = t * -0.134820239 + 0.574620028
    q = t * q - 0.553629602
    q = t * q + 0.539064123
    q = t * q - 0.0675557507
    q = t * q + 0.145822084
    q = t * q - 0.00350064633
    return tl.where(z < 0.0, q * e, 1.0 - q * e), e


@triton.jit
def gelu(z):
    return z * normal(z)[0]


@triton.jit
def gelu_derivative(z):
    """Phi(z) + z phi(z)."""
    cdf, e = normal(z)
    return cdf + z * (e * 0.3989422804014327)


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr,  # (T, I), (I,), (T, I)
    n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows[:, None] * n_columns + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(y_ptr + at, gelu(z).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr,  # (T, I), (T, I), (I,), (T, I)
    partial_ptr,  # (1, n_programs, I) float32: dbias
    n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        at = rows[:, None] * n_columns + columns[None, :]
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dx = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * gelu_derivative(z)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    store_partial(partial_ptr, 0, dbias, columns, n_columns)


def bias_gelu_fwd(x, bias):
    check_matrix(x)
    x = x.contiguous()
    n_rows, n_columns = x.shape
    check_shapes((n_columns,), bias=bias)
    y = torch.empty_like(x)
    rows, warps = tuned(f"bias_gelu_fwd I{n_columns}", TILE)
    if n_rows:
        bias_gelu_fwd_kernel[(triton.cdiv(n_rows, rows), triton.cdiv(n_columns, COLUMNS))](
            x, bias, y, n_rows, n_columns, ROWS=rows, COLUMNS=COLUMNS, num_warps=warps
        )
    return y


def bias_gelu_bwd(dy, x, bias):
    dy, x = dy.contiguous(), x.contiguous()
    n_rows, n_columns = x.shape
    dx = torch.empty_like(x)
    column_blocks = triton.cdiv(n_columns, COLUMNS)
    rows, warps = tuned(f"bias_gelu_bwd I{n_columns}", TILE)
    programs = max(1, min(triton.cdiv(n_rows, rows), triton.cdiv(backward_programs(x.device), column_blocks)))
    partial = torch.empty((1, programs, n_columns), dtype=torch.float32, device=x.device)
    bias_gelu_bwd_kernel[(programs, column_blocks)](
        dy, x, bias, dx, partial, n_rows, n_columns, ROWS=rows, COLUMNS=COLUMNS, num_warps=warps
    )
    return dx, *sum_partials(partial, bias.dtype)
