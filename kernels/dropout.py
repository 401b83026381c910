"""The dropout mask of bertfast/ops/dropout.py inside a Triton kernel: the same words, the same comparison; and dropout.

One Philox-4x32-7 call (Salmon et al. 2011) serves four column blocks of 16. In the accumulator of a tensor-core
product those four blocks lie in the same thread, so that handing the words out moves no data there.
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.dropout import keep_scale, threshold

from .rows import check_matrix, check_row_key

ROWS, COLUMNS = 8, 256  # of a tile of `dropout`


@triton.jit
def philox_words(seed, column0, position, sequence, c3, COLUMNS: tl.constexpr):
    """Four words (rows, COLUMNS / 4) uint32 for the columns column0 .. column0 + COLUMNS, a multiple of 64 each.

    position, sequence: (rows, 1) or scalar counters; c3: stream << 8 | head. Entry (row, 16 g + r) of word w belongs
    to column column0 + 64 g + 16 w + r.
    """
    c0 = column0 // 4 + tl.arange(0, COLUMNS // 4)
    return tl.philox(seed, c0[None, :], position, sequence, c3, 7)


@triton.jit
def keep_mask(
    seed, column0, position, sequence, c3, dropped_below, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The (ROWS, COLUMNS) mask of kept elements; arguments as `philox_words`, dropped_below the int32 threshold."""
    w0, w1, w2, w3 = philox_words(seed, column0, position, sequence, c3, COLUMNS)
    limit = dropped_below.to(tl.uint32, bitcast=True)
    k0, k1 = (w0 >= limit).to(tl.int8), (w1 >= limit).to(tl.int8)
    k2, k3 = (w2 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8)
    kept = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # (ROWS, COLUMNS / 4, 2, 2): the last two are word // 2, word % 2
    kept = tl.reshape(kept, (ROWS, COLUMNS // 64, 16, 2, 2))
    kept = tl.permute(kept, (0, 1, 3, 4, 2))
    return tl.reshape(kept, (ROWS, COLUMNS)) != 0


@triton.jit
def row_counters(row_key_ptr, rows, inside, HAS_ROW_KEY: tl.constexpr):
    """Position and sequence index (rows, 1), the dropout counters c1 and c2; without keys the row itself counts."""
    if HAS_ROW_KEY:
        key = tl.load(row_key_ptr + rows, mask=inside, other=0)[:, None]
        return key.to(tl.uint32), (key >> 32).to(tl.uint32)
    else:
        return rows[:, None].to(tl.uint32), 0


@triton.jit(do_not_specialize=["n_rows", "threshold", "stream"])
def dropout_kernel(
    x_ptr, y_ptr, seed_ptr, row_key_ptr,  # (T, H), (T, H), (1,), (T,)
    n_rows, n_columns, threshold, kept_scale, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    at = rows[:, None] * n_columns + columns[None, :]
    position, sequence = row_counters(row_key_ptr, rows, rows < n_rows, HAS_ROW_KEY)
    c3 = (stream << 8).to(tl.uint32)
    keep = keep_mask(tl.load(seed_ptr), first, position, sequence, c3, threshold, ROWS, COLUMNS)
    y = tl.where(keep, tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * kept_scale, 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x, p, seed, row_key, stream):
    check_matrix(x)
    x = x.contiguous()
    n_rows, n_columns = x.shape
    check_row_key(row_key, n_rows)
    y = torch.empty_like(x)
    if n_rows:
        dropout_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS))](
            x, y, seed, row_key, n_rows, n_columns, signed_threshold(p), keep_scale(p), stream,
            ROWS=ROWS, COLUMNS=COLUMNS, HAS_ROW_KEY=row_key is not None, num_warps=4,
        )  # fmt: skip
    return y


def signed_threshold(p: float) -> int:
    """The threshold as the int32 with the same bits: so the kernel's argument has one type at every p."""
    t = threshold(p)
    return t - 2**32 if t >= 2**31 else t
