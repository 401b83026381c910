"""Loss and gradients of the masked-language-model head, in one of two ways, by the size of the logits alone.

Up to LOGITS_LIMIT bytes: one GEMM for the logits, a cross entropy that writes the gradient over them, two GEMMs for
dhidden and dweight, a column sum for dbias. The logits exist in the compute dtype, for the masked rows alone (cf.
flash-attention's and Liger-Kernel's in-place cross entropy). Their rows are padded to a multiple of 64 columns, so that
every access is 16 bytes wide.

Above: no logits. Tiles of them are formed in registers, in fp32, once for an online log-sum-exp, and once more for
their gradient, of which a block of columns exists at a time (cf. Wijmans et al. 2024, "Cut your losses in
large-vocabulary language models", which adds by atomics where this keeps a fixed order). One GEMM more, little memory.

Rows without a label give nothing, and nothing depends on how many there are: static shapes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .hardware import architecture, backward_programs, tuned
from .rows import check_shapes, column_sum

IGNORE_INDEX = tl.constexpr(-100)
EVEN = 8  # words: tensor cores at full rate want products in multiples of 16 bytes; the vocabulary's last few go apart
LOGITS_LIMIT = 1 << 29  # bytes
BLOCK_BYTES = 1 << 26  # of the gradient of the logits, where it exists by blocks


@triton.jit
def load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row):
    """Logits plus bias in fp32; -inf in the padding, which is read but not used."""
    x = tl.load(row_ptr + columns, mask=columns < stride_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < stride_row, other=0.0)
    return tl.where(columns < n_columns, x + bias, float("-inf"))


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
    peak = float("-inf")
    peak_before = float("-inf")  # over the columns before the label
    total = 0.0
    for first in tl.range(0, stride_row, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row)
        new_peak = tl.maximum(peak, tl.max(x, 0))  # finite: a block begins before the padding
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(x - new_peak), 0)
        peak_before = tl.maximum(peak_before, tl.max(tl.where(columns < label, x, float("-inf")), 0))
        peak = new_peak
    known = (label >= 0) & (label < n_columns)  # the loss of another label is no number, not what lies there
    of_label = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    of_label += tl.load(bias_ptr + label, mask=known, other=0.0)
    tl.store(loss_ptr + row, tl.log(total) - (of_label - peak))
    tl.store(correct_ptr + row, ((of_label == peak) & (peak_before < peak)).to(tl.int32))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit
        scale, inverse = tl.load(scale_ptr), 1.0 / total
        for first in tl.range(0, stride_row, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = load_logits(row_ptr, bias_ptr, columns, n_columns, stride_row)
            gradient = scale * (tl.exp(x - peak) * inverse - tl.where(columns == label, 1.0, 0.0))
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < stride_row)


@triton.jit
def add_product(total, a, b):
    """total + a @ b; in fp32 each product is summed by itself first: an error that grows with shorter chains."""
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="ieee"), tl.full(total.shape, 1.0, tl.float32), total)
    return tl.dot(a, b, total)


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, rows, columns, n_rows, n_columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) logits in fp32; -inf beyond the vocabulary."""
    k = tl.arange(0, DEPTH)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * width + k[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[:, None] * width + k[None, :]
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, width, DEPTH):
        inside = (first + k < width)[None, :]
        x = tl.load(hidden_ptrs + first, mask=(rows < n_rows)[:, None] & inside, other=0.0)
        w = tl.load(weight_ptrs + first, mask=(columns < n_columns)[:, None] & inside, other=0.0)
        logits = add_product(logits, x, tl.trans(w))
    bias = tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    return tl.where((columns < n_columns)[None, :], logits + bias[None, :], float("-inf"))


@triton.jit
def add_compensated(total, excess, shrink, more):
    """(total - excess) * shrink + more, and what rounding added to it, to be taken off next time (Kahan 1965)."""
    before, more = total * shrink, more - excess * shrink
    total = before + more
    return total, (total - before) - more


@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_tiles"])
def statistics_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr,  # (R, H), (V, H), (V,), (R,)
    partial_ptr, best_ptr,  # (3, n_splits, R) float32: peak, total, label's logit; (n_splits, R) int32: first at peak
    n_rows, n_columns, width, n_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of rows over a share of the vocabulary, n_tiles tiles of columns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < n_rows, other=IGNORE_INDEX)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    excess = tl.zeros((ROWS,), tl.float32)
    of_label = tl.full((ROWS,), float("-inf"), tl.float32)  # where the label is not in this share
    best = tl.zeros((ROWS,), tl.int32)
    for tile in tl.range(tl.program_id(1) * n_tiles, (tl.program_id(1) + 1) * n_tiles):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        if tile * COLUMNS < n_columns:
            x = logits_tile(
                hidden_ptr, weight_ptr, bias_ptr, rows, columns, n_rows, n_columns, width, ROWS, COLUMNS, DEPTH
            )
            tile_peak = tl.max(x, 1)
            tile_best = tl.min(tl.where(x == tile_peak[:, None], columns[None, :], 2147483647), 1)
            best = tl.where(tile_peak > peak, tile_best, best)
            new_peak = tl.maximum(peak, tile_peak)
            more = tl.sum(tl.exp(x - new_peak[:, None]), 1)
            total, excess = add_compensated(total, excess, tl.exp(peak - new_peak), more)
            at_label = tl.where(columns[None, :] == labels[:, None], x, float("-inf"))
            of_label = tl.maximum(of_label, tl.max(at_label, 1))
            peak = new_peak
    at = tl.program_id(1).to(tl.int64) * n_rows + rows
    stride = tl.num_programs(1).to(tl.int64) * n_rows
    tl.store(partial_ptr + at, peak, mask=rows < n_rows)
    tl.store(partial_ptr + stride + at, total, mask=rows < n_rows)
    tl.store(partial_ptr + 2 * stride + at, of_label, mask=rows < n_rows)
    tl.store(best_ptr + at, best, mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_splits"])
def combine_kernel(
    partial_ptr, best_ptr, labels_ptr,  # as above
    softmax_ptr,  # (2, R) float32: the softmax of logits x is exp(x - first) * second; second is 0 without a label
    loss_ptr, correct_ptr,  # (R,) float32; (R,) int32
    n_rows, n_splits,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n_rows
    labels = tl.load(labels_ptr + rows, mask=inside, other=IGNORE_INDEX)
    stride = n_splits.to(tl.int64) * n_rows
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    excess = tl.zeros((ROWS,), tl.float32)
    of_label = tl.full((ROWS,), float("-inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for split in tl.range(0, n_splits):
        at = tl.cast(split, tl.int64) * n_rows + rows
        split_peak = tl.load(partial_ptr + at, mask=inside, other=0.0)
        split_total = tl.load(partial_ptr + stride + at, mask=inside, other=1.0)
        of_label = tl.maximum(of_label, tl.load(partial_ptr + 2 * stride + at, mask=inside, other=0.0))
        best = tl.where(split_peak > peak, tl.load(best_ptr + at, mask=inside, other=0), best)
        new_peak = tl.maximum(peak, split_peak)
        more = split_total * tl.exp(split_peak - new_peak)
        total, excess = add_compensated(total, excess, tl.exp(peak - new_peak), more)
        peak = new_peak
    labelled = labels != IGNORE_INDEX
    tl.store(softmax_ptr + rows, peak, mask=inside)
    tl.store(softmax_ptr + n_rows + rows, tl.where(labelled, 1.0 / total, 0.0), mask=inside)
    tl.store(loss_ptr + rows, tl.where(labelled, tl.log(total) - (of_label - peak), 0.0), mask=inside)
    tl.store(correct_ptr + rows, (labelled & (best == labels)).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["n_rows", "n_columns", "first_column"])
def gradient_kernel(
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, softmax_ptr, scale_ptr,
    dlogits_ptr,  # (R, n_block): columns first_column .. of the gradient; zeros beyond the vocabulary
    n_rows, n_columns, width, first_column, n_block,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """scale * (softmax - onehot) of one tile."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_block = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first_column + in_block
    x = logits_tile(hidden_ptr, weight_ptr, bias_ptr, rows, columns, n_rows, n_columns, width, ROWS, COLUMNS, DEPTH)
    labels = tl.load(labels_ptr + rows, mask=rows < n_rows, other=IGNORE_INDEX)
    peak = tl.load(softmax_ptr + rows, mask=rows < n_rows, other=0.0)
    inverse = tl.load(softmax_ptr + n_rows + rows, mask=rows < n_rows, other=0.0)
    onehot = tl.where(columns[None, :] == labels[:, None], 1.0, 0.0)
    gradient = tl.load(scale_ptr) * (tl.exp(x - peak[:, None]) * inverse[:, None] - onehot)
    at = rows.to(tl.int64)[:, None] * n_block + in_block[None, :]
    tl.store(dlogits_ptr + at, gradient.to(dlogits_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None])


@triton.jit(do_not_specialize=["n_rows", "n_columns"])
def add_product_kernel(
    dlogits_ptr, weight_ptr, out_ptr,  # (R, n_block), (n_columns, H), (R, H) float32
    n_rows, n_columns, width, n_block,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out += dlogits @ weight, in fp32."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    total = tl.load(out_ptr + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
    for first in tl.range(0, n_columns, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x = tl.load(dlogits_ptr + rows[:, None] * n_block + k[None, :], mask=(rows < n_rows)[:, None], other=0.0)
        of_weight = (k < n_columns)[:, None] & (columns < width)[None, :]
        w = tl.load(weight_ptr + k.to(tl.int64)[:, None] * width + columns[None, :], mask=of_weight, other=0.0)
        total = add_product(total, x, w)
    tl.store(out_ptr + rows[:, None] * width + columns[None, :], total, mask=inside)


def cross_entropy(hidden, weight, bias, labels, scale):
    """The three sums, and the padded rows (R, stride) in which, if `scale` is given, dlogits are where logits were."""
    n_rows, n_columns = hidden.shape[0], weight.shape[0]
    stride_row = triton.cdiv(n_columns, 64) * 64
    logits = torch.empty((n_rows, stride_row), dtype=hidden.dtype, device=hidden.device)
    even = n_columns // EVEN * EVEN
    torch.mm(hidden, weight[:even].t(), out=logits[:, :even])
    torch.mm(hidden, weight[even:].t(), out=logits[:, even:n_columns])
    loss = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(n_rows, dtype=torch.int32, device=hidden.device)
    if n_rows:
        block, per_thread = tuned("cross_entropy", (4096, 16))
        block = min(triton.next_power_of_2(stride_row), block)
        warps = max(1, block // (32 * per_thread))
        cross_entropy_kernel[(n_rows,)](
            logits, F.pad(bias.float(), (0, stride_row - n_columns)), labels, scale, loss, correct,
            n_columns, stride_row, BLOCK=block, GRADIENT=scale is not None, num_warps=warps,
        )  # fmt: skip
    return loss.sum(), (labels != IGNORE_INDEX.value).sum(), correct.sum(), logits


CORRECT = (32, 64, 32, 4, 1)  # of fp32, a correctness path, and of ROCm, for which nothing was chosen


def tile_options(width: int, element_size: int) -> dict:
    """The tile of a product over `width`: rows, columns, a multiple of the depth, warps and stages."""
    arch, tile = architecture(), CORRECT
    if element_size != 4:
        if not isinstance(arch, str):
            # by the report of benchmarks/aot.py nothing spills; three stages were the fastest such on an H200
            tile = 128, 128, 32 if arch >= 120 else 64, 8, 3 if arch == 90 else 2
        tile = tuned(f"projection H{width}", tile)
    return dict(zip(("ROWS", "COLUMNS", "DEPTH", "num_warps", "num_stages"), tile))


def statistics(hidden, weight, bias, labels):
    """The three sums, and what each row's softmax needs, (2, R) as in `combine_kernel`; no logits."""
    n_rows, (n_columns, width) = hidden.shape[0], weight.shape
    options = tile_options(width, hidden.element_size())
    blocks, tiles = triton.cdiv(n_rows, options["ROWS"]), triton.cdiv(n_columns, options["COLUMNS"])
    tiles_of_split = triton.cdiv(tiles, min(tiles, max(1, backward_programs(hidden.device) // blocks)))
    splits = triton.cdiv(tiles, tiles_of_split)
    partial = torch.empty((3, splits, n_rows), dtype=torch.float32, device=hidden.device)
    best = torch.empty((splits, n_rows), dtype=torch.int32, device=hidden.device)
    statistics_kernel[(blocks, splits)](
        hidden, weight, bias, labels, partial, best, n_rows, n_columns, width, tiles_of_split, **options
    )
    softmax = torch.empty((2, n_rows), dtype=torch.float32, device=hidden.device)
    loss = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(n_rows, dtype=torch.int32, device=hidden.device)
    combine_kernel[(triton.cdiv(n_rows, 128),)](partial, best, labels, softmax, loss, correct, n_rows, splits, ROWS=128)
    return loss.sum(), (labels != IGNORE_INDEX.value).sum(), correct.sum(), softmax


def gradients_without_logits(hidden, weight, bias, labels, scale, softmax, dweight, accumulate):
    """dhidden and dbias; dweight is written or added to. A block of columns at a time."""
    n_rows, (n_columns, width) = hidden.shape[0], weight.shape
    options = tile_options(width, hidden.element_size())
    columns = options["COLUMNS"]
    n_block = max(1, BLOCK_BYTES // (n_rows * hidden.element_size() * columns)) * columns
    n_block = min(n_block, triton.cdiv(n_columns, columns) * columns)
    dlogits = torch.empty((n_rows, n_block), dtype=hidden.dtype, device=hidden.device)
    dhidden = torch.zeros((n_rows, width), dtype=torch.float32, device=hidden.device)
    dbias = torch.empty_like(bias)
    blocks = triton.cdiv(n_rows, options["ROWS"])
    for first in range(0, n_columns, n_block):
        end = min(first + n_block, n_columns)
        gradient_kernel[(blocks, n_block // columns)](
            hidden, weight, bias, labels, softmax, scale, dlogits, n_rows, n_columns, width, first, n_block, **options
        )
        add_product_kernel[(blocks, triton.cdiv(width, columns))](
            dlogits, weight[first:end], dhidden, n_rows, end - first, width, n_block, **options
        )
        put_product(dweight[first:end], dlogits[:, : end - first].t(), hidden, accumulate)
        dbias[first:end] = column_sum(dlogits, bias.dtype)[: end - first]
    return dhidden.to(hidden.dtype), dbias


def put_product(out, a, b, accumulate):
    """out = a @ b, or out += a @ b; out may be float32 where a and b are not. Autocast casts no product `out=`."""
    if out.dtype != a.dtype:
        product = torch.mm(a, b, out=a.new_empty(out.shape))
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def logits_fit(hidden, weight) -> bool:
    return hidden.shape[0] * weight.shape[0] * hidden.element_size() <= LOGITS_LIMIT


def check(hidden, weight, bias, labels):
    check_shapes((len(weight), hidden.shape[1]), weight=weight)
    check_shapes((len(weight),), bias=bias)
    check_shapes((len(hidden),), labels=labels)


def masked_vocab_projection_eval(hidden, weight, bias, labels):
    check(hidden, weight, bias, labels)
    if logits_fit(hidden, weight):
        return cross_entropy(hidden, weight, bias, labels, None)[:3]
    return statistics(hidden.contiguous(), weight.contiguous(), bias, labels)[:3]


def masked_vocab_projection_fwd(hidden, weight, bias, labels, scale):
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    *sums, dhidden, dbias = masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, False)
    return *sums, dhidden, dweight, dbias


def masked_vocab_projection_fwd_into(hidden, weight, bias, labels, scale, dweight, accumulate):
    check(hidden, weight, bias, labels)
    scale = scale.float()
    if logits_fit(hidden, weight):
        *sums, padded = cross_entropy(hidden, weight, bias, labels, scale)
        n_columns, even = weight.shape[0], weight.shape[0] // EVEN * EVEN
        for words in (slice(0, even), slice(even, n_columns)):
            put_product(dweight[words], padded[:, words].t(), hidden, accumulate)
        dhidden = hidden.new_empty(hidden.shape)
        put_product(dhidden, padded[:, :even], weight[:even], False)
        dhidden.addmm_(padded[:, even:n_columns], weight[even:])
        return *sums, dhidden, column_sum(padded, bias.dtype)[:n_columns]
    inputs = hidden.contiguous(), weight.contiguous(), bias, labels
    *sums, softmax = statistics(*inputs)
    return *sums, *gradients_without_logits(*inputs, scale, softmax, dweight, accumulate)
