"""y = LayerNorm(dropout(x + bias) + residual) and its gradient: one read and one write of each (T, H) tensor.

A program holds whole rows in registers, in fp32. The backward keeps the column sums (dbias, dweight, dln_bias) in
registers over all its rows and writes them once; a second stage adds the programs' sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.dropout import keep_scale

from .dropout import keep_mask, signed_threshold
from .hardware import backward_programs
from .rows import row_tile, store_partial, sum_partials


@triton.jit
def row_counters(row_key_ptr, rows, inside, HAS_ROW_KEY: tl.constexpr):
    """Position and sequence index (rows, 1), the dropout counters c1 and c2; without keys the row itself counts."""
    if HAS_ROW_KEY:
        key = tl.load(row_key_ptr + rows, mask=inside, other=0)[:, None]
        return key.to(tl.uint32), (key >> 32).to(tl.uint32)
    else:
        return rows[:, None].to(tl.uint32), 0


@triton.jit
def normalize(z, inside, n_columns, eps):
    """mean (rows,), rstd (rows,) and x_hat (rows, columns) of fp32 rows; two passes for the variance."""
    mean = tl.sum(z, 1) / n_columns
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / n_columns + eps)
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def normalize_gradient(g, x_hat, rstd, n_columns):
    """dz of LayerNorm for g = dy * weight; x_hat and g are zero outside the row."""
    c1 = tl.sum(g, 1) / n_columns
    c2 = tl.sum(g * x_hat, 1) / n_columns
    return (g - c1[:, None] - c2[:, None] * x_hat) * rstd[:, None]


@triton.jit
def load_row(ptr, columns, n_columns):
    """A parameter (H,) as (1, columns) float32."""
    return tl.load(ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n_rows", "threshold", "stream"])
def add_layer_norm_fwd_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr,  # (T, H), (H,), (T, H), (H,), (H,)
    y_ptr, z_ptr, mean_ptr, rstd_ptr,  # (T, H), (T, H), (T,), (T,)
    seed_ptr, row_key_ptr,  # (1,), (T,)
    n_rows, n_columns, eps, threshold, kept_scale, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows[:, None] * n_columns + columns[None, :]

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

    mean, rstd, x_hat = normalize(z.to(tl.float32), inside, n_columns, eps)
    y = x_hat * load_row(weight_ptr, columns, n_columns) + load_row(ln_bias_ptr, columns, n_columns)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "threshold", "stream"])
def add_layer_norm_bwd_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr,  # (T, H), (T, H), (T,), (T,), (H,)
    dz_ptr, dx_ptr,  # (T, H) each
    partial_ptr,  # (3, n_programs, H): dbias, dweight, dln_bias
    seed_ptr, row_key_ptr,
    n_rows, n_columns, threshold, kept_scale, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr, HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    weight = load_row(weight_ptr, columns, n_columns)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dln_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        at = rows[:, None] * n_columns + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)

        x_hat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        dz = normalize_gradient(dy * weight, x_hat, rstd, n_columns)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
        dln_bias += dy
        if DROPOUT:
            position, sequence = row_counters(row_key_ptr, rows, rows < n_rows, HAS_ROW_KEY)
            c3 = (stream << 8).to(tl.uint32)
            keep = keep_mask(tl.load(seed_ptr), 0, position, sequence, c3, threshold, ROWS, COLUMNS)
            dz = tl.where(keep, dz * kept_scale, 0.0)
            tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dz

    store_partial(partial_ptr, 0, dbias, columns, n_columns)
    store_partial(partial_ptr, 1, dweight, columns, n_columns)
    store_partial(partial_ptr, 2, dln_bias, columns, n_columns)


def add_layer_norm_fwd(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream):
    x, residual = x.contiguous(), residual.contiguous()
    n_rows, n_columns = x.shape
    y, z = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    rows, columns, warps = row_tile(n_columns, per_thread=32)
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
    rows, columns, warps = row_tile(n_columns, per_thread=16)
    programs = max(1, min(triton.cdiv(n_rows, rows), backward_programs(z.device)))
    partial = torch.empty((3, programs, n_columns), dtype=torch.float32, device=z.device)
    add_layer_norm_bwd_kernel[(programs,)](
        dy, z, mean, rstd, weight, dz, dx, partial, seed, row_key,
        n_rows, n_columns, signed_threshold(p), keep_scale(p), stream,
        ROWS=rows, COLUMNS=columns, DROPOUT=p > 0.0, HAS_ROW_KEY=row_key is not None, num_warps=warps,
    )  # fmt: skip
    return dz, dx, *sum_partials(partial, weight.dtype)
