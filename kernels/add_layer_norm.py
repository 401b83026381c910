"""y = LayerNorm(dropout(x + bias) + residual) and its gradient: one read and one write of each (T, H) tensor.

A program holds whole rows in registers, in fp32. The backward keeps the column sums (dbias, dweight, dln_bias) in
registers over all its rows and writes them once; a second stage adds the programs' sums in a fixed order. (Of rows
beyond 4096 columns dbias is summed by a kernel of its own.)
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.dropout import keep_scale

from .dropout import keep_mask, row_counters, signed_threshold
from .hardware import backward_programs
from .layer_norm import KEPT, layer_norm_gradient, load_row, store_layer_norm, tile_of_rows
from .rows import STAGES, check_matrix, check_row_key, check_shapes, column_sum, row_tile, store_partial, sum_partials


@triton.jit(do_not_specialize=["n_rows", "threshold", "stream"])
def add_layer_norm_fwd_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr,  # (T, H), (H,), (T, H), (H,), (H,)
    y_ptr, z_ptr, mean_ptr, rstd_ptr,  # (T, H), (T, H), (T,), (T,)
    seed_ptr, row_key_ptr,  # (1,), (T,)
    n_rows, n_columns, eps, threshold, kept_scale, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    rows, columns, inside, at = tile_of_rows(tl.program_id(0) * ROWS, n_rows, n_columns, ROWS, COLUMNS)

    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += load_row(bias_ptr, columns, n_columns)
    if DROPOUT:
        position, sequence = row_counters(row_key_ptr, rows, rows < n_rows, HAS_ROW_KEY)
        c3 = (stream << 8).to(tl.uint32)
        keep = keep_mask(tl.load(seed_ptr), 0, position, sequence, c3, threshold, ROWS, COLUMNS)
        z = tl.where(keep, z * kept_scale, 0.0)
    z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = z.to(z_ptr.dtype.element_ty)  # the statistics are those of the stored z, which is what the backward reads
    tl.store(z_ptr + at, z, mask=inside)
    store_layer_norm(
        z.to(tl.float32), rows, columns, inside, at, weight_ptr, ln_bias_ptr, y_ptr, mean_ptr, rstd_ptr,
        n_rows, n_columns, eps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "threshold", "stream"])
def add_layer_norm_bwd_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr,  # (T, H), (T, H), (T,), (T,), (H,)
    dz_ptr, dx_ptr,  # (T, H) each
    partial_ptr,  # (3, n_programs, H): dweight, dln_bias, dbias; of wide rows the first two
    seed_ptr, row_key_ptr,
    n_rows, n_columns, threshold, kept_scale, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr, HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    weight = load_row(weight_ptr, columns, n_columns)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dln_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    stages: tl.constexpr = STAGES if COLUMNS <= KEPT else 1
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=stages):
        rows, _, inside, at = tile_of_rows(first, n_rows, n_columns, ROWS, COLUMNS)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if COLUMNS > KEPT:
            weight = load_row(weight_ptr, columns, n_columns)
        dz, x_hat = layer_norm_gradient(dy, z, weight, mean_ptr, rstd_ptr, rows, inside, n_rows, n_columns)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
        dln_bias += dy
        if DROPOUT:
            position, sequence = row_counters(row_key_ptr, rows, rows < n_rows, HAS_ROW_KEY)
            c3 = (stream << 8).to(tl.uint32)
            keep = keep_mask(tl.load(seed_ptr), 0, position, sequence, c3, threshold, ROWS, COLUMNS)
            dz = tl.where(keep, dz * kept_scale, 0.0)
            tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=inside)
        if COLUMNS <= KEPT:
            dbias += dz

    store_partial(partial_ptr, 0, dweight, columns, n_columns)
    store_partial(partial_ptr, 1, dln_bias, columns, n_columns)
    if COLUMNS <= KEPT:
        store_partial(partial_ptr, 2, dbias, columns, n_columns)


def add_layer_norm_fwd(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream):
    check_matrix(x)
    x, residual = x.contiguous(), residual.contiguous()
    n_rows, n_columns = x.shape
    check_shapes(x.shape, residual=residual)
    check_shapes((n_columns,), bias=bias, weight=weight, ln_bias=ln_bias)
    check_row_key(row_key, n_rows)
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows, columns, warps = row_tile("add_layer_norm_fwd", n_columns, per_thread=32)
    if n_rows:
        add_layer_norm_fwd_kernel[(triton.cdiv(n_rows, rows),)](
            x, bias, residual, weight, ln_bias, y, z, mean, rstd, seed, row_key,
            n_rows, n_columns, eps, signed_threshold(p), keep_scale(p), stream,
            ROWS=rows, COLUMNS=columns, HAS_BIAS=bias is not None, DROPOUT=p > 0.0, HAS_ROW_KEY=row_key is not None,
            num_warps=warps,
        )  # fmt: skip
    return y, z, mean, rstd


def add_layer_norm_bwd(dy, z, mean, rstd, weight, p, seed, row_key, stream):
    dy = dy.contiguous()
    n_rows, n_columns = z.shape
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if p > 0.0 else z.new_empty(0, n_columns)
    rows, columns, warps = row_tile("add_layer_norm_bwd", n_columns, per_thread=16)
    programs = max(1, min(triton.cdiv(n_rows, rows), backward_programs(z.device)))
    n_sums = 3 if columns <= KEPT.value else 2
    partial = torch.empty((n_sums, programs, n_columns), dtype=torch.float32, device=z.device)
    add_layer_norm_bwd_kernel[(programs,)](
        dy, z, mean, rstd, weight, dz, dx, partial, seed, row_key,
        n_rows, n_columns, signed_threshold(p), keep_scale(p), stream,
        ROWS=rows, COLUMNS=columns, DROPOUT=p > 0.0, HAS_ROW_KEY=row_key is not None, num_warps=warps,
    )  # fmt: skip
    dweight, dln_bias, *dbias = sum_partials(partial, weight.dtype)
    return dz, dx, dbias[0] if dbias else column_sum(dx if p > 0.0 else dz, weight.dtype), dweight, dln_bias
