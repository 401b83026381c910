"""What the row-wise ops share: how a (T, H) tensor is cut into tiles, and the second stage of a sum over its rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def store_partial(partial_ptr, index, value, columns, n_columns):
    """Sum `value` (rows, columns) over its rows into entry (index, program) of (n_sums, n_programs, n_columns)."""
    row = (index * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tl.store(partial_ptr + row * n_columns + columns, tl.sum(value, 0), mask=columns < n_columns)


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (n_sums, n_partials, n_columns) float32
    out_ptr,  # (n_sums, n_columns)
    n_partials, n_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_row = tl.program_id(1).to(tl.int64) * n_partials
    inside = columns < n_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in tl.range(0, n_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        at = (first_row + rows)[:, None] * n_columns + columns[None, :]
        total += tl.load(partial_ptr + at, mask=(rows < n_partials)[:, None] & inside[None, :], other=0.0)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n_columns + columns, out, mask=inside)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(n_sums, n_partials, H) float32 -> n_sums tensors (H,), added in a fixed order: no atomics, same bits always."""
    n_sums, n_partials, n_columns = partial.shape
    out = torch.empty((n_sums, n_columns), dtype=dtype, device=partial.device)
    sum_partials_kernel[(triton.cdiv(n_columns, 32), n_sums)](
        partial, out, n_partials, n_columns, BLOCK_ROWS=64, BLOCK_COLUMNS=32, num_warps=4
    )
    return out.unbind(0)


def row_tile(n_columns: int, per_thread: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of whole rows with `per_thread` elements a thread; narrow rows share a warp.

    32 suit a forward pass (at most 1024 columns need no barrier), 16 one that keeps more in registers: column sums, or
    what erf needs.
    """
    columns = max(64, triton.next_power_of_2(n_columns))
    rows = max(1, 32 * per_thread // columns)
    return rows, columns, min(rows * columns // (32 * per_thread), 32)
