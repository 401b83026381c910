"""What the row-wise ops share: how a (T, H) tensor is cut into tiles, and the second stage of a sum over its rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hardware import backward_programs, tuned

SUM_COLUMNS = 512  # of a tile of the column sum
STAGES = tl.constexpr(3)  # of a loop over rows: the next are on their way while one is computed


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


@triton.jit(do_not_specialize=["n_rows"])
def column_sum_kernel(
    x_ptr, partial_ptr,  # (R, n_columns), (1, n_programs, n_columns) float32
    n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        at = rows[:, None] * n_columns + columns[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    store_partial(partial_ptr, 0, total, columns, n_columns)


def check_shapes(wanted: tuple[int, ...], **tensors: Tensor | None) -> None:
    """ValueError for a tensor of another shape: a kernel would read past its end."""
    for name, t in tensors.items():
        if t is not None and t.shape != wanted:
            raise ValueError(f"{name} has shape {list(t.shape)}, expected {list(wanted)}")


def check_row_key(row_key: Tensor | None, n_rows: int) -> None:
    if row_key is not None and (row_key.shape != (n_rows,) or row_key.dtype != torch.int64):
        raise ValueError(f"row_key must be int64 of shape [{n_rows}], got {row_key.dtype} {list(row_key.shape)}")


def check_matrix(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (rows, columns), got {list(x.shape)}")


def sum_partials(partial: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(n_sums, n_partials, H) float32 -> n_sums tensors (H,), added in a fixed order: no atomics, same bits always."""
    n_sums, n_partials, n_columns = partial.shape
    out = torch.empty((n_sums, n_columns), dtype=dtype, device=partial.device)
    sum_partials_kernel[(triton.cdiv(n_columns, 32), n_sums)](
        partial, out, n_partials, n_columns, BLOCK_ROWS=64, BLOCK_COLUMNS=32, num_warps=4
    )
    return out.unbind(0)


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, n_columns) -> (n_columns,), added in a fixed order."""
    n_rows, n_columns = x.shape
    column_blocks = triton.cdiv(n_columns, SUM_COLUMNS)
    programs = max(1, min(triton.cdiv(n_rows, 16), triton.cdiv(backward_programs(x.device), column_blocks)))
    partial = torch.empty((1, programs, n_columns), dtype=torch.float32, device=x.device)
    column_sum_kernel[(programs, column_blocks)](
        x, partial, n_rows, n_columns, ROWS=8, COLUMNS=SUM_COLUMNS, num_warps=4
    )
    return sum_partials(partial, dtype)[0]


def row_tile(kernel: str, n_columns: int, per_thread: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of whole rows with `per_thread` elements a thread; narrow rows share a warp.

    32 suit a forward pass (at most 1024 columns need no barrier), 16 one that keeps more in registers: column sums, or
    what GELU needs. What was measured on this GPU goes before that.
    """
    per_thread = tuned(f"{kernel} H{n_columns}", per_thread)
    columns = max(64, triton.next_power_of_2(n_columns))
    rows = max(1, 32 * per_thread // columns)
    return rows, columns, min(rows * columns // (32 * per_thread), 32)
