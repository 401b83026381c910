"""The dropout mask of bertfast/ops/dropout.py inside a Triton kernel: the same words, the same comparison.

One Philox-4x32-7 call (Salmon et al. 2011) serves four column blocks of 16. In the accumulator of a tensor-core
product those four blocks lie in the same thread, so that handing the words out moves no data there.
"""

import triton
import triton.language as tl

from bertfast.ops.dropout import threshold


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


def signed_threshold(p: float) -> int:
    """The threshold as the int32 with the same bits: so the kernel's argument has one type at every p."""
    t = threshold(p)
    return t - 2**32 if t >= 2**31 else t
