"""y = LayerNorm(GELU(x + bias)) and its gradient, the transform of the masked-language-model head, in one pass each.

GELU(x + bias) is formed again in the backward from x: a few instructions instead of another (P, H) tensor.
"""

import torch
import triton
import triton.language as tl

from .bias_gelu import gelu, gelu_derivative
from .hardware import backward_programs
from .layer_norm import KEPT, layer_norm_gradient, load_row, store_layer_norm, tile_of_rows
from .rows import STAGES, check_matrix, check_shapes, column_sum, row_tile, store_partial, sum_partials


@triton.jit(do_not_specialize=["n_rows"])
def gelu_layer_norm_fwd_kernel(
    x_ptr, bias_ptr, weight_ptr, ln_bias_ptr,  # (P, H), (H,), (H,), (H,)
    y_ptr, mean_ptr, rstd_ptr,  # (P, H), (P,), (P,)
    n_rows, n_columns, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, at = tile_of_rows(tl.program_id(0) * ROWS, n_rows, n_columns, ROWS, COLUMNS)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + load_row(bias_ptr, columns, n_columns)
    store_layer_norm(
        gelu(z), rows, columns, inside, at, weight_ptr, ln_bias_ptr, y_ptr, mean_ptr, rstd_ptr, n_rows, n_columns, eps
    )


@triton.jit(do_not_specialize=["n_rows"])
def gelu_layer_norm_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, weight_ptr, mean_ptr, rstd_ptr,  # (P, H), (P, H), (H,), (H,), (P,), (P,)
    dx_ptr,  # (P, H)
    partial_ptr,  # (3, n_programs, H): dweight, dln_bias, dbias; of wide rows the first two
    n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    bias = load_row(bias_ptr, columns, n_columns)
    weight = load_row(weight_ptr, columns, n_columns)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dln_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    stages: tl.constexpr = STAGES if COLUMNS <= KEPT else 1
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=stages):
        rows, _, inside, at = tile_of_rows(first, n_rows, n_columns, ROWS, COLUMNS)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COLUMNS > KEPT:
            bias = load_row(bias_ptr, columns, n_columns)
            weight = load_row(weight_ptr, columns, n_columns)
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
        dz, x_hat = layer_norm_gradient(dy, gelu(z), weight, mean_ptr, rstd_ptr, rows, inside, n_rows, n_columns)
        dx = dz * gelu_derivative(z)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if COLUMNS <= KEPT:
            dbias += dx
        dweight += dy * x_hat
        dln_bias += dy
    store_partial(partial_ptr, 0, dweight, columns, n_columns)
    store_partial(partial_ptr, 1, dln_bias, columns, n_columns)
    if COLUMNS <= KEPT:
        store_partial(partial_ptr, 2, dbias, columns, n_columns)


def gelu_layer_norm_fwd(x, bias, weight, ln_bias, eps):
    check_matrix(x)
    x = x.contiguous()
    n_rows, n_columns = x.shape
    check_shapes((n_columns,), bias=bias, weight=weight, ln_bias=ln_bias)
    y = torch.empty_like(x)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows, columns, warps = row_tile("gelu_layer_norm_fwd", n_columns, per_thread=16)
    if n_rows:
        gelu_layer_norm_fwd_kernel[(triton.cdiv(n_rows, rows),)](
            x, bias, weight, ln_bias, y, mean, rstd, n_rows, n_columns, eps,
            ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


def gelu_layer_norm_bwd(dy, x, bias, weight, mean, rstd):
    dy, x = dy.contiguous(), x.contiguous()
    n_rows, n_columns = x.shape
    dx = torch.empty_like(x)
    per_thread = 32 if n_columns > KEPT.value else 16  # at most 8 warps then: more of them would spill on sm_100
    rows, columns, warps = row_tile("gelu_layer_norm_bwd", n_columns, per_thread)
    programs = max(1, min(triton.cdiv(n_rows, rows), backward_programs(x.device)))
    n_sums = 3 if columns <= KEPT.value else 2
    partial = torch.empty((n_sums, programs, n_columns), dtype=torch.float32, device=x.device)
    gelu_layer_norm_bwd_kernel[(programs,)](
        dy, x, bias, weight, mean, rstd, dx, partial, n_rows, n_columns,
        ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    dweight, dln_bias, *dbias = sum_partials(partial, weight.dtype)
    return dx, dbias[0] if dbias else column_sum(dx, weight.dtype), dweight, dln_bias
