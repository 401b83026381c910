"""Loss and gradients of the masked-language-model head: one GEMM for the logits, a cross entropy that writes the
gradient over them, two GEMMs for dhidden and dweight, a column sum for dbias.

The logits exist in the compute dtype, for the masked rows alone (cf. flash-attention's and Liger-Kernel's in-place
cross entropy). Their rows are padded to a multiple of 64 columns, so that every access is 16 bytes wide. Rows without
a label cost no exponential, and nothing depends on how many there are: static shapes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .hardware import backward_programs
from .rows import store_partial, sum_partials

LOG2E = tl.constexpr(1.4426950408889634)
IGNORE_INDEX = tl.constexpr(-100)
COLUMNS = 512  # of a tile of the column sum


@triton.jit
def load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row):
    """Logits plus bias in fp32 and units of log 2; -inf in the padding, which is read but not used."""
    x = tl.load(row_ptr + columns, mask=columns < stride_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < stride_row, other=0.0)
    return tl.where(columns < n_columns, (x + bias) * LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["n_columns"])
def cross_entropy_kernel(
    logits_ptr, bias_ptr, labels_ptr, scale_ptr,  # (R, stride_row), (stride_row,) float32, (R,), scalar
    loss_ptr, correct_ptr,  # (R,) float32, (R,) int32
    n_columns, stride_row,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One row: loss, whether the label is the (first) largest logit, and scale * (softmax - onehot) over the logits.

    The padding gets a gradient of zero.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    if label == IGNORE_INDEX:
        tl.store(loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if GRADIENT:
            for first in tl.range(0, stride_row, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + columns, zeros, mask=columns < stride_row)
        return
    peak = float("-inf")  # in units of log 2
    peak_before = float("-inf")  # over the columns before the label
    total = 0.0
    for first in tl.range(0, stride_row, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row)
        new_peak = tl.maximum(peak, tl.max(x, 0))  # finite: a block begins before the padding
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(x - new_peak), 0)
        peak_before = tl.maximum(peak_before, tl.max(tl.where(columns < label, x, float("-inf")), 0))
        peak = new_peak
    of_label = (tl.load(row_ptr + label).to(tl.float32) + tl.load(bias_ptr + label)) * LOG2E
    lse = peak + tl.log2(total)
    tl.store(loss_ptr + row, (lse - of_label) / LOG2E)
    tl.store(correct_ptr + row, ((of_label == peak) & (peak_before < peak)).to(tl.int32))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit
        scale = tl.load(scale_ptr)
        for first in tl.range(0, stride_row, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row)
            gradient = scale * (tl.exp2(x - lse) - tl.where(columns == label, 1.0, 0.0))
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < stride_row)


@triton.jit(do_not_specialize=["n_rows"])
def column_sum_kernel(
    x_ptr, partial_ptr,  # (R, n_columns), (1, n_programs, n_columns) float32
    n_rows, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        at = rows[:, None] * n_columns + columns[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    store_partial(partial_ptr, 0, total, columns, n_columns)


def cross_entropy(hidden, weight, bias, labels, scale):
    """The three sums, and the padded rows (R, stride) in which, if `scale` is given, dlogits are where logits were."""
    n_rows, n_columns = hidden.shape[0], weight.shape[0]
    stride_row = triton.cdiv(n_columns, 64) * 64
    logits = torch.empty((n_rows, stride_row), dtype=hidden.dtype, device=hidden.device)
    torch.mm(hidden, weight.t(), out=logits[:, :n_columns])
    loss = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(n_rows, dtype=torch.int32, device=hidden.device)
    if n_rows:
        block = min(triton.next_power_of_2(stride_row), 4096)
        cross_entropy_kernel[(n_rows,)](
            logits, F.pad(bias.float(), (0, stride_row - n_columns)), labels, scale, loss, correct,
            n_columns, stride_row, BLOCK=block, GRADIENT=scale is not None, num_warps=max(1, block // 512),
        )  # fmt: skip
    return loss.sum(), (labels != -100).sum(), correct.sum(), logits


def column_sum(x, dtype):
    n_rows, n_columns = x.shape
    column_blocks = triton.cdiv(n_columns, COLUMNS)
    programs = max(1, min(triton.cdiv(n_rows, 16), triton.cdiv(backward_programs(x.device), column_blocks)))
    partial = torch.empty((1, programs, n_columns), dtype=torch.float32, device=x.device)
    column_sum_kernel[(programs, column_blocks)](x, partial, n_rows, n_columns, ROWS=4, COLUMNS=COLUMNS, num_warps=4)
    return sum_partials(partial, dtype)[0]


def masked_vocab_projection_eval(hidden, weight, bias, labels):
    return cross_entropy(hidden, weight, bias, labels, None)[:3]


def masked_vocab_projection_fwd(hidden, weight, bias, labels, scale):
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    *sums, dhidden, dbias = masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, False)
    return *sums, dhidden, dweight, dbias


def masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, accumulate):
    *sums, padded = cross_entropy(hidden, weight, bias, labels, scale.float())
    dlogits = padded[:, : weight.shape[0]]
    if dweight.dtype != hidden.dtype:  # a float32 sink under half-precision parameters
        product = torch.mm(dlogits.t(), hidden)
        dweight.add_(product) if accumulate else dweight.copy_(product)
    elif accumulate:
        dweight.addmm_(dlogits.t(), hidden)
    else:
        torch.mm(dlogits.t(), hidden, out=dweight)
    return *sums, torch.mm(dlogits, weight), column_sum(padded, bias.dtype)[: weight.shape[0]]
