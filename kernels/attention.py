"""out = dropout(softmax(scale * Q K^T + mask)) V over packed sequences, and its gradient; no atomics, same bits always.

Forward: one program for a block of queries, keys in blocks with an online softmax (FlashAttention, Dao et al. 2022,
in exp2). Backward: where a sequence's queries fit one block, one program reads everything of a sequence and head once;
otherwise one kernel for dq, which also leaves delta, then one for dk and dv. Programs of the sequence after the last
write the zeros of the rows that belong to none.
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.attention import HEAD_SIZES
from bertfast.ops.dropout import keep_scale

from .dropout import keep_mask, signed_threshold
from .hardware import architecture, tuned
from .rows import check_row_key, check_shapes

LOG2E = tl.constexpr(1.4426950408889634)
UNSPECIALIZED = [  # arguments whose value must not lead to another compilation
    "stride_q_row", "stride_q_head", "stride_k_row", "stride_k_head", "stride_v_row", "stride_v_head",
    "stride_dq_row", "stride_dq_head", "stride_dk_row", "stride_dk_head",
    "n_rows_q", "n_rows_k", "n_heads", "n_sequences", "n_blocks", "threshold", "stream",
]  # fmt: skip


@triton.jit
def head_start(ptr, start, stride_row, head, stride_head):
    """The first row of one head of the sequence that starts at row `start`; what follows it is reached in int32."""
    return ptr + start.to(tl.int64) * stride_row + head.to(tl.int64) * stride_head


@triton.jit
def load_rows(ptr, rows, stride_row, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, counted from `ptr`: (rows, BLOCK_D), zeros outside."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] if D == BLOCK_D else inside[:, None] & (d < D)[None, :]
    return tl.load(ptr + (rows[:, None] * stride_row + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, stride_row, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] if D == BLOCK_D else inside[:, None] & (d < D)[None, :]
    tl.store(ptr + (rows[:, None] * stride_row + d[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tail(
    ptr, start, n_rows, stride_row, head, stride_head, block, n_blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Zeros into the rows from `start` on, which belong to no sequence; n_blocks programs share them."""
    rows = tl.arange(0, ROWS)
    for first in tl.range(block * ROWS, n_rows - start, n_blocks * ROWS):
        at = head_start(ptr, start + first, stride_row, head, stride_head)
        zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
        store_rows(at, rows, stride_row, rows < n_rows - start - first, zeros, D, BLOCK_D)


@triton.jit
def query_counters(row_key_ptr, start, rows, inside, sequence, HAS_ROW_KEY: tl.constexpr):
    """Position (rows,) int32 and dropout's sequence counter, (rows, 1) or scalar, of each query."""
    if HAS_ROW_KEY:
        key = tl.load(row_key_ptr + start + rows, mask=inside, other=0)
        return key.to(tl.int32), (key >> 32).to(tl.uint32)[:, None]
    else:
        return rows, sequence.to(tl.uint32)


@triton.jit
def visible_keys(position, columns, n_keys, prefix, MASK_MODE: tl.constexpr):
    """Which key columns each query sees, (rows, columns) or (1, columns)."""
    visible = (columns < n_keys)[None, :]
    if MASK_MODE == 1:
        visible = visible & (columns[None, :] <= position[:, None])
    if MASK_MODE == 2:
        visible = visible & ((columns[None, :] <= position[:, None]) | (columns < prefix)[None, :])
    return visible


@triton.jit
def last_visible(position, inside, n_keys, prefix, MASK_MODE: tl.constexpr):
    """How many leading keys a block of queries needs to look at."""
    if MASK_MODE == 0:
        return n_keys
    last = tl.max(tl.where(inside, position, 0), 0) + 1
    if MASK_MODE == 2:
        last = tl.maximum(last, prefix)
    return tl.minimum(last, n_keys)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr,  # (Tq, N, D), (Tk, N, D), (Tk, N, D)
    out_ptr, lse_ptr,  # (Tq, N, D), (N, Tq) float32
    cu_q_ptr, cu_k_ptr, prefix_ptr,  # (B+1,), (B+1,), (B,) int32
    seed_ptr, row_key_ptr,  # (1,), (Tq,) int64
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,  # in units of VECTOR
    n_rows_q, n_heads, n_sequences, n_blocks, scale, threshold, kept_scale, stream,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr,
    MASK_MODE: tl.constexpr, DROPOUT: tl.constexpr, HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    sequence, block, head = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks, tl.program_id(1)
    start_q = tl.load(cu_q_ptr + sequence)
    stride_out = n_heads * D
    lse_ptr += head.to(tl.int64) * n_rows_q + start_q
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if sequence == n_sequences:
        zero_tail(out_ptr, start_q, n_rows_q, stride_out, head, D, block, n_blocks, D, BLOCK_D, BLOCK_M)
        for first in tl.range(0, n_rows_q - start_q, n_blocks * BLOCK_M):
            tl.store(lse_ptr + first + rows, float("inf"), mask=first + rows < n_rows_q - start_q)
        return
    n_queries = tl.load(cu_q_ptr + sequence + 1) - start_q
    if block * BLOCK_M >= n_queries:
        return
    start_k = tl.load(cu_k_ptr + sequence)
    n_keys = tl.load(cu_k_ptr + sequence + 1) - start_k
    prefix = tl.load(prefix_ptr + sequence) if MASK_MODE == 2 else 0
    q_ptr = head_start(q_ptr, start_q, stride_q_row * VECTOR, head, stride_q_head * VECTOR)
    k_ptr = head_start(k_ptr, start_k, stride_k_row * VECTOR, head, stride_k_head * VECTOR)
    v_ptr = head_start(v_ptr, start_k, stride_v_row * VECTOR, head, stride_v_head * VECTOR)
    out_ptr = head_start(out_ptr, start_q, stride_out, head, D)

    inside = rows < n_queries
    position, key_of_sequence = query_counters(row_key_ptr, start_q, rows, inside, sequence, HAS_ROW_KEY)
    q = load_rows(q_ptr, rows, stride_q_row * VECTOR, inside, D, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c3 = ((stream << 8) | head).to(tl.uint32)
    scale *= LOG2E
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # row maximum so far, in units of log 2
    total = tl.zeros((BLOCK_M,), tl.float32)  # row sum of exp2(score - peak)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(0, last_visible(position, inside, n_keys, prefix, MASK_MODE), BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, columns, stride_k_row * VECTOR, columns < n_keys, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(visible_keys(position, columns, n_keys, prefix, MASK_MODE), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)  # finite: every query sees the first key
        rescale = tl.exp2(peak - new_peak)
        probabilities = tl.exp2(scores * scale - new_peak[:, None])
        total = total * rescale + tl.sum(probabilities, 1)
        out *= rescale[:, None]
        if DROPOUT:
            keep = keep_mask(seed, first, position[:, None], key_of_sequence, c3, threshold, BLOCK_M, BLOCK_N)
            probabilities = tl.where(keep, probabilities, 0.0)
        v = load_rows(v_ptr, columns, stride_v_row * VECTOR, columns < n_keys, D, BLOCK_D)
        out = tl.dot(probabilities.to(v.dtype), v, out, input_precision="ieee")
        peak = new_peak

    empty = total == 0.0  # no key at all
    total = tl.where(empty, 1.0, total)
    store_rows(out_ptr, rows, stride_out, inside, out * (kept_scale / total)[:, None], D, BLOCK_D)
    lse = tl.where(empty, float("inf"), (peak + tl.log2(total)) / LOG2E)
    tl.store(lse_ptr + rows, lse, mask=inside)


@triton.jit
def signed_probabilities(
    q, k, lse, position, columns, n_keys, prefix, seed, key_of_sequence, c3, scale, threshold, first_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_MODE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """P (BLOCK_M, BLOCK_N) float32, negative where dropout drops it: the sign carries the mask at no register's cost.

    lse in units of log 2, +inf where there is no query.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(scores * scale - lse[:, None])
    p = tl.where(visible_keys(position, columns, n_keys, prefix, MASK_MODE), p, 0.0)
    if DROPOUT:
        keep = keep_mask(seed, first_column, position[:, None], key_of_sequence, c3, threshold, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, -p)
    return p


@triton.jit
def score_gradient(p, dp, delta, DROPOUT: tl.constexpr):
    """dS / (scale * kept_scale) from the signed P: the scales wait for the last products; delta has lost the second."""
    if DROPOUT:
        return tl.abs(p) * (tl.where(p > 0.0, dp, 0.0) - delta[:, None])
    return p * (dp - delta[:, None])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # as in the forward; dout, out contiguous
    dq_ptr, dk_ptr, dv_ptr, delta_ptr,  # (Tq, N, D), (Tk, N, D) twice with the strides of dk, (N, Tq) float32
    cu_q_ptr, cu_k_ptr, prefix_ptr, seed_ptr, row_key_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_dq_row, stride_dq_head, stride_dk_row, stride_dk_head,
    n_rows_q, n_rows_k, n_heads, n_sequences, n_blocks, scale, threshold, kept_scale, stream,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr,
    MASK_MODE: tl.constexpr, DROPOUT: tl.constexpr, HAS_ROW_KEY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dq for a block of queries. WHOLE: the block is all of the sequence's queries, and dk, dv are formed as well."""
    sequence, block, head = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks, tl.program_id(1)
    start_q, start_k = tl.load(cu_q_ptr + sequence), tl.load(cu_k_ptr + sequence)
    stride_dq_row, stride_dq_head = stride_dq_row * VECTOR, stride_dq_head * VECTOR
    stride_dk_row, stride_dk_head = stride_dk_row * VECTOR, stride_dk_head * VECTOR
    if sequence == n_sequences:
        zero_tail(dq_ptr, start_q, n_rows_q, stride_dq_row, head, stride_dq_head, block, n_blocks, D, BLOCK_D, BLOCK_M)
        zero_tail(dk_ptr, start_k, n_rows_k, stride_dk_row, head, stride_dk_head, block, n_blocks, D, BLOCK_D, BLOCK_M)
        zero_tail(dv_ptr, start_k, n_rows_k, stride_dk_row, head, stride_dk_head, block, n_blocks, D, BLOCK_D, BLOCK_M)
        return
    n_queries = tl.load(cu_q_ptr + sequence + 1) - start_q
    n_keys = tl.load(cu_k_ptr + sequence + 1) - start_k
    if not WHOLE:
        if block * BLOCK_M >= n_queries:
            return
    prefix = tl.load(prefix_ptr + sequence) if MASK_MODE == 2 else 0
    stride_out = n_heads * D
    q_ptr = head_start(q_ptr, start_q, stride_q_row * VECTOR, head, stride_q_head * VECTOR)
    k_ptr = head_start(k_ptr, start_k, stride_k_row * VECTOR, head, stride_k_head * VECTOR)
    v_ptr = head_start(v_ptr, start_k, stride_v_row * VECTOR, head, stride_v_head * VECTOR)
    dq_ptr = head_start(dq_ptr, start_q, stride_dq_row, head, stride_dq_head)
    dk_ptr = head_start(dk_ptr, start_k, stride_dk_row, head, stride_dk_head)
    dv_ptr = head_start(dv_ptr, start_k, stride_dk_row, head, stride_dk_head)
    of_head = head.to(tl.int64) * n_rows_q + start_q

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_queries
    position, key_of_sequence = query_counters(row_key_ptr, start_q, rows, inside, sequence, HAS_ROW_KEY)
    q = load_rows(q_ptr, rows, stride_q_row * VECTOR, inside, D, BLOCK_D)
    dout = load_rows(head_start(dout_ptr, start_q, stride_out, head, D), rows, stride_out, inside, D, BLOCK_D)
    out = load_rows(head_start(out_ptr, start_q, stride_out, head, D), rows, stride_out, inside, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) / kept_scale
    if not WHOLE:
        tl.store(delta_ptr + of_head + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + of_head + rows, mask=inside, other=float("inf")) * LOG2E
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c3 = ((stream << 8) | head).to(tl.uint32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = n_keys if WHOLE else last_visible(position, inside, n_keys, prefix, MASK_MODE)
    for first in tl.range(0, last, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, columns, stride_k_row * VECTOR, columns < n_keys, D, BLOCK_D)
        v = load_rows(v_ptr, columns, stride_v_row * VECTOR, columns < n_keys, D, BLOCK_D)
        p = signed_probabilities(
            q, k, lse, position, columns, n_keys, prefix, seed, key_of_sequence, c3, scale * LOG2E, threshold, first,
            BLOCK_M, BLOCK_N, MASK_MODE, DROPOUT,
        )  # fmt: skip
        ds = score_gradient(p, tl.dot(dout, tl.trans(v), input_precision="ieee"), delta, DROPOUT).to(k.dtype)
        if WHOLE:  # the order of the products decides how many registers are alive
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * (scale * kept_scale)
            store_rows(dk_ptr, columns, stride_dk_row, columns < n_keys, dk, D, BLOCK_D)
            kept = tl.trans(tl.maximum(p, 0.0).to(dout.dtype))
            dv = tl.dot(kept, dout, input_precision="ieee") * kept_scale
            store_rows(dv_ptr, columns, stride_dk_row, columns < n_keys, dv, D, BLOCK_D)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_rows(dq_ptr, rows, stride_dq_row, inside, dq * (scale * kept_scale), D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    cu_q_ptr, cu_k_ptr, prefix_ptr, seed_ptr, row_key_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_dk_row, stride_dk_head,
    n_rows_q, n_heads, n_blocks, scale, threshold, kept_scale, stream,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr,
    MASK_MODE: tl.constexpr, DROPOUT: tl.constexpr, HAS_ROW_KEY: tl.constexpr,
):  # fmt: skip
    """dk and dv for a block of keys, over all queries of its sequence."""
    sequence, block, head = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks, tl.program_id(1)
    start_q, start_k = tl.load(cu_q_ptr + sequence), tl.load(cu_k_ptr + sequence)
    n_queries = tl.load(cu_q_ptr + sequence + 1) - start_q
    n_keys = tl.load(cu_k_ptr + sequence + 1) - start_k
    if block * BLOCK_N >= n_keys:
        return
    prefix = tl.load(prefix_ptr + sequence) if MASK_MODE == 2 else 0
    stride_out = n_heads * D
    q_ptr = head_start(q_ptr, start_q, stride_q_row * VECTOR, head, stride_q_head * VECTOR)
    k_ptr = head_start(k_ptr, start_k, stride_k_row * VECTOR, head, stride_k_head * VECTOR)
    v_ptr = head_start(v_ptr, start_k, stride_v_row * VECTOR, head, stride_v_head * VECTOR)
    dk_ptr = head_start(dk_ptr, start_k, stride_dk_row * VECTOR, head, stride_dk_head * VECTOR)
    dv_ptr = head_start(dv_ptr, start_k, stride_dk_row * VECTOR, head, stride_dk_head * VECTOR)
    dout_ptr = head_start(dout_ptr, start_q, stride_out, head, D)
    of_head = head.to(tl.int64) * n_rows_q + start_q

    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, columns, stride_k_row * VECTOR, columns < n_keys, D, BLOCK_D)
    v = load_rows(v_ptr, columns, stride_v_row * VECTOR, columns < n_keys, D, BLOCK_D)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    c3 = ((stream << 8) | head).to(tl.uint32)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(0, n_queries, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = rows < n_queries
        position, key_of_sequence = query_counters(row_key_ptr, start_q, rows, inside, sequence, HAS_ROW_KEY)
        q = load_rows(q_ptr, rows, stride_q_row * VECTOR, inside, D, BLOCK_D)
        dout = load_rows(dout_ptr, rows, stride_out, inside, D, BLOCK_D)
        lse = tl.load(lse_ptr + of_head + rows, mask=inside, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + of_head + rows, mask=inside, other=0.0)
        p = signed_probabilities(
            q, k, lse, position, columns, n_keys, prefix, seed, key_of_sequence, c3, scale * LOG2E, threshold,
            block * BLOCK_N, BLOCK_M, BLOCK_N, MASK_MODE, DROPOUT,
        )  # fmt: skip
        ds = score_gradient(p, tl.dot(dout, tl.trans(v), input_precision="ieee"), delta, DROPOUT).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        dv = tl.dot(tl.trans(tl.maximum(p, 0.0).to(dout.dtype)), dout, dv, input_precision="ieee")
    store_rows(dk_ptr, columns, stride_dk_row * VECTOR, columns < n_keys, dk * (scale * kept_scale), D, BLOCK_D)
    store_rows(dv_ptr, columns, stride_dk_row * VECTOR, columns < n_keys, dv * kept_scale, D, BLOCK_D)


CORRECT = (32, 64, 4, 1)  # of fp32, a correctness path, and of ROCm, for which nothing was chosen
CORRECT_WIDE = (16, 64, 4, 1)  # of fp32 beyond D=64: 32 queries need more shared memory than sm_86 and sm_120 have
# BLOCK_M, BLOCK_N, warps and stages for sixteen-bit types by kernel, architecture and largest head size, without and
# with dropout where they differ: chosen from the report of benchmarks/aot.py, so that nothing spills; for sm_90 up to
# D=64 the fastest such on an H200. None: the backward of whole sequences does not fit; the two kernels of long ones are
# taken.
NARROW, DEEP, WIDE, WIDEST = (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3)
SINGLE, SHORT = (128, 64, 8, 1), (64, 64, 8, 1)
TILES = {
    "fwd": {
        80: {64: NARROW, 128: WIDEST},
        86: {64: NARROW, 128: WIDEST},
        90: {64: (64, 64, 4, 3), 128: WIDEST},
        100: {128: WIDEST},
        120: {64: (64, 64, 4, 3), 128: (WIDEST, (64, 64, 8, 3))},
    },
    "bwd_whole": {
        80: {32: SINGLE, 63: (SINGLE, None), 64: SINGLE, 128: None},
        86: {32: SINGLE, 63: (SINGLE, None), 64: SINGLE, 128: None},
        90: {128: SINGLE},
        100: {64: SINGLE, 128: None},
        120: {32: SINGLE, 63: ((64, 64, 4, 1), None), 64: ((64, 64, 4, 1), SINGLE), 128: None},
    },
    "bwd_dq": {
        80: {128: NARROW},
        86: {64: NARROW, 128: DEEP},
        90: {16: WIDE, 64: (64, 64, 4, 3), 128: NARROW},
        100: {64: WIDE, 128: NARROW},
        120: {64: NARROW, 128: DEEP},
    },
    "bwd_dkdv": {
        80: {32: NARROW, 63: (SHORT, (64, 64, 4, 1)), 64: (NARROW, (64, 64, 4, 1)), 127: SHORT, 128: SINGLE},
        86: {32: NARROW, 63: (SHORT, (64, 64, 4, 1)), 64: (64, 64, 4, 1), 128: SHORT},
        90: {64: (64, 64, 4, 1), 128: SINGLE},
        100: {64: SINGLE, 128: NARROW},
        120: {64: SINGLE, 128: SHORT},
    },
}

MASKED = {"bwd_dq": DEEP, "bwd_dkdv": SHORT}  # causal and prefix masks need registers: more warps, but on sm_90, sm_100
CAUSAL_DROPOUT_120 = (32, 64, 8, 1)  # dk and dv there: every larger tile spills, 24 B at the least
MASKED_DROPOUT_100 = (64, 64, 8, 3)  # the forward there beyond D=64: WIDEST spills 8 B


def tile_key(kernel: str, head_size: int, dropout: bool, mask_mode: int) -> str:
    return f"attention {kernel} D{head_size} {'dropout' if dropout else 'no dropout'} mask {mask_mode}"


def configuration(kernel: str, arch: int | str, head_size: int, element_size: int, dropout: bool, mask_mode: int):
    """BLOCK_M, BLOCK_N, warps and stages of a kernel, or None: as measured on this GPU, else as shipped."""
    if element_size == 4:
        return CORRECT if head_size <= 64 else CORRECT_WIDE
    shipped = CORRECT if isinstance(arch, str) else shipped_tile(kernel, arch, head_size, dropout, mask_mode)
    return tuned(tile_key(kernel, head_size, dropout, mask_mode), shipped)


def shipped_tile(kernel: str, arch: int, head_size: int, dropout: bool, mask_mode: int):
    """Of the nearest listed architecture not above `arch`."""
    listed = max(a for a in TILES[kernel] if a <= max(arch, 80))
    if (kernel, listed, mask_mode, dropout) == ("bwd_dkdv", 120, 1, True):
        return CAUSAL_DROPOUT_120
    if (kernel, listed, dropout) == ("fwd", 100, True) and mask_mode and head_size > 64:
        return MASKED_DROPOUT_100
    if mask_mode and kernel in MASKED and listed not in (90, 100):
        return MASKED[kernel]
    of_arch = TILES[kernel][listed]
    tile = of_arch[min(d for d in of_arch if d >= head_size)]
    return tile if tile is None or isinstance(tile[0], int) else tile[dropout]


def vector_and_strides(*tensors):
    """The largest element count up to 16 bytes that divides all row and head strides, and the strides in its units."""
    strides = [s for t in tensors for s in t.stride()[:2]]
    vector = 16 // tensors[0].element_size()
    if any(s % vector for s in strides) or any(t.storage_offset() % vector for t in tensors):
        vector = 1
    return vector, [s // vector for s in strides]


def check(q, k, v, scale, longest):
    """q, k, v with contiguous heads; NotImplementedError for what the kernels cannot do."""
    if q.shape[2] not in HEAD_SIZES:
        raise NotImplementedError(f"the Triton attention needs a head size from 16 to 128, got {q.shape[2]}")
    if scale <= 0.0:
        raise NotImplementedError(f"the Triton attention needs a positive scale, got {scale}")
    if longest * max(t.stride(0) for t in (q, k, v)) >= 2**31:
        raise NotImplementedError(f"rows of a sequence of up to {longest} lie too far apart for offsets in int32")
    return [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v)]


def attention_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p, seed, q_row_key, stream
):
    q, k, v = check(q, k, v, scale, max(max_q, max_k))
    n_rows, n_heads, d = q.shape
    check_shapes((len(k), n_heads, d), k=k, v=v)
    check_shapes((len(cu_seqlens_q),), cu_seqlens_k=cu_seqlens_k)
    check_shapes((len(cu_seqlens_q) - 1,), prefix_lens=prefix_lens if mask_mode == 2 else None)
    check_row_key(q_row_key, n_rows)
    out = torch.empty((n_rows, n_heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((n_heads, n_rows), dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(d)
    block_m, block_n, warps, stages = configuration("fwd", architecture(), d, q.element_size(), p > 0.0, mask_mode)
    vector, strides = vector_and_strides(q, k, v)
    n_sequences, n_blocks = cu_seqlens_q.numel() - 1, max(1, triton.cdiv(max_q, block_m))
    attention_fwd_kernel[((n_sequences + 1) * n_blocks, n_heads)](
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, prefix_lens, seed, q_row_key, *strides,
        n_rows, n_heads, n_sequences, n_blocks, scale, signed_threshold(p), keep_scale(p), stream,
        D=d, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, VECTOR=vector,
        MASK_MODE=mask_mode, DROPOUT=p > 0.0, HAS_ROW_KEY=q_row_key is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def attention_bwd(dout, q, k, v, *rest):
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty((k.shape[0], 2, *k.shape[1:]), dtype=k.dtype, device=k.device)
    backward(dq, *dkv.unbind(1), dout, q, k, v, *rest)
    return dq, dkv


def attention_packed_bwd(dout, q, k, v, *rest):
    dqkv = torch.empty((q.shape[0], 3, *q.shape[1:]), dtype=q.dtype, device=q.device)
    backward(*dqkv.unbind(1), dout, q, k, v, *rest)
    return dqkv


def backward(
    dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, mask_mode, prefix_lens, p,
    seed, q_row_key, stream,
):  # fmt: skip
    """Write dq, dk and dv, which may be views of one tensor; dk and dv have the same strides."""
    q, k, v = check(q, k, v, scale, max(max_q, max_k))
    dout = dout.contiguous()
    n_heads, d = q.shape[1:]
    block_d = triton.next_power_of_2(d)
    vector, strides = vector_and_strides(q, k, v, dq, dk)
    n_sequences = cu_seqlens_q.numel() - 1
    arch, size = architecture(), q.element_size()
    options = dict(
        D=d, BLOCK_D=block_d, VECTOR=vector, MASK_MODE=mask_mode, DROPOUT=p > 0.0, HAS_ROW_KEY=q_row_key is not None
    )
    layout = cu_seqlens_q, cu_seqlens_k, prefix_lens, seed, q_row_key
    numbers = scale, signed_threshold(p), keep_scale(p), stream
    delta = torch.empty_like(lse)

    tile = configuration("bwd_whole", arch, d, size, p > 0.0, mask_mode)
    whole = tile is not None and max_q <= tile[0]
    block_m, block_n, warps, stages = tile if whole else configuration("bwd_dq", arch, d, size, p > 0.0, mask_mode)
    n_blocks = max(1, triton.cdiv(max_q, block_m))
    attention_bwd_dq_kernel[((n_sequences + 1) * n_blocks, n_heads)](
        dout, q, k, v, out, lse, dq, dk, dv, delta, *layout, *strides,
        q.shape[0], k.shape[0], n_heads, n_sequences, n_blocks, *numbers,
        **options, BLOCK_M=block_m, BLOCK_N=block_n, WHOLE=whole, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not whole:
        block_m, block_n, warps, stages = configuration("bwd_dkdv", arch, d, size, p > 0.0, mask_mode)
        n_blocks = max(1, triton.cdiv(max_k, block_n))
        attention_bwd_dkdv_kernel[(n_sequences * n_blocks, n_heads)](
            dout, q, k, v, lse, delta, dk, dv, *layout, *strides[:6], *strides[8:],
            q.shape[0], n_heads, n_blocks, *numbers,
            **options, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
