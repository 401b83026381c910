"""The rows of a LayerNorm, forward and backward: what the ops that end in one share."""

import triton
import triton.language as tl

KEPT = tl.constexpr(4096)  # columns up to which a backward has registers for the parameters and all three column sums


@triton.jit
def tile_of_rows(first, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `first` and following, whole: row and column numbers, the mask (ROWS, COLUMNS) and the int64 offsets."""
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return rows, columns, inside, rows[:, None] * n_columns + columns[None, :]


@triton.jit
def load_row(ptr, columns, n_columns):
    """A parameter (H,) as (1, columns) float32."""
    return tl.load(ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_layer_norm(
    z, rows, columns, inside, at,  # z (rows, columns) float32, and its tile
    weight_ptr, ln_bias_ptr,  # (H,) each
    y_ptr, mean_ptr, rstd_ptr,  # (T, H), (T,), (T,)
    n_rows, n_columns, eps,
):  # fmt: skip
    """y = LayerNorm(z) and its statistics; two passes for the variance."""
    mean = tl.sum(z, 1) / n_columns
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / n_columns + eps)
    x_hat = centred * rstd[:, None]
    y = x_hat * load_row(weight_ptr, columns, n_columns) + load_row(ln_bias_ptr, columns, n_columns)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def layer_norm_gradient(dy, z, weight, mean_ptr, rstd_ptr, rows, inside, n_rows, n_columns):
    """dz and x_hat (rows, columns) float32 for y = LayerNorm(z); dy is zero outside."""
    mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
    x_hat = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
    g = dy * weight
    c1 = tl.sum(g, 1) / n_columns
    c2 = tl.sum(g * x_hat, 1) / n_columns
    return (g - c1[:, None] - c2[:, None] * x_hat) * rstd[:, None], x_hat
