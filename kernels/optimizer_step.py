"""AdamW, LAMB and the gradient norm over many tensors in one launch: addresses come from a table on the device.

Each program finds its tensor among the table's first programs, and walks CHUNK elements of it. AdamW reads every
tensor once and writes once the moments, the master and the compute copy. LAMB needs the norms of a whole tensor
first: one pass over the moments, one small launch for the trust ratios, one pass over masters and compute copies.
Nothing is read back to the host, and sums have a fixed order.
"""

import math
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl

CHUNK = 8192  # elements of a program
BLOCK = tl.constexpr(1024)


@triton.jit
def find_chunk(firsts_ptr, n_tensors, TENSORS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's tensor and its first element there; firsts (n_tensors + 1,) int32: each tensor's first program."""
    at = tl.arange(0, TENSORS)
    firsts = tl.load(firsts_ptr + at, mask=at < n_tensors, other=2147483647)
    tensor = tl.sum((firsts <= tl.program_id(0)).to(tl.int32), 0) - 1
    return tensor, (tl.program_id(0) - tl.load(firsts_ptr + tensor)).to(tl.int64) * CHUNK


@triton.jit
def tensor_pointer(addresses_ptr, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Entry `index` of the table of addresses as a pointer; ALIGNED to 16 bytes, so that accesses may be that wide."""
    pointer = tl.load(addresses_ptr + index).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_float(ptr, at, size, WHOLE: tl.constexpr):
    """float32 values at `at`, zeros beyond `size`; a WHOLE block has no mask, which would hinder 16-byte accesses."""
    if WHOLE:
        return tl.load(ptr + at).to(tl.float32)
    else:
        return tl.load(ptr + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def store_float(ptr, at, size, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=at < size)


@triton.jit
def load_master(param_ptr, master_ptr, at, size, SPLIT: tl.constexpr, WHOLE: tl.constexpr):
    """fp32 masters; SPLIT: of what a bf16 parameter, read as int16, leaves of their bits (see split_master)."""
    if not SPLIT:
        return load_float(master_ptr, at, size, WHOLE)
    if WHOLE:
        upper, rest = tl.load(param_ptr + at), tl.load(master_ptr + at)
    else:
        upper = tl.load(param_ptr + at, mask=at < size, other=0)
        rest = tl.load(master_ptr + at, mask=at < size, other=0)
    return ((upper.to(tl.int32) << 16) + rest.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def store_master(
    param_ptr, master_ptr, at, size, value, SPLIT: tl.constexpr, HAS_MASTER: tl.constexpr, WHOLE: tl.constexpr
):
    if SPLIT:
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        mask = None if WHOLE else at < size
        tl.store(param_ptr + at, upper.to(tl.int16), mask=mask)
        tl.store(master_ptr + at, (bits - (upper << 16)).to(tl.int16), mask=mask)
    else:
        store_float(master_ptr, at, size, value, WHOLE)
        if HAS_MASTER:
            store_float(param_ptr, at, size, value, WHOLE)


@triton.jit
def step_block(
    param_ptr, grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, at, size,
    lr, grad_scale, gain1, gain2, correction1, correction2, eps, weight_decay, trust,
    PASS: tl.constexpr, HAS_MASTER: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of a pass; returns the masters as they were and the direction of the step."""
    m = load_float(exp_avg_ptr, at, size, WHOLE)
    v = load_float(exp_avg_sq_ptr, at, size, WHOLE)
    value = load_master(param_ptr, master_ptr, at, size, SPLIT, WHOLE)
    if PASS != "lamb update":
        g = load_float(grad_ptr, at, size, WHOLE) * grad_scale
        m += gain1 * (g - m)
        v += gain2 * (g * g - v)
        store_float(exp_avg_ptr, at, size, m, WHOLE)
        store_float(exp_avg_sq_ptr, at, size, v, WHOLE)
    u = m / correction1 / (tl.sqrt(v / correction2) + eps)
    if PASS == "adamw":
        new = value * (1.0 - lr * weight_decay) - lr * u
    else:
        u += weight_decay * value
        new = value - lr * trust * u
    if PASS != "lamb moments":
        store_master(param_ptr, master_ptr, at, size, new, SPLIT, HAS_MASTER, WHOLE)
    return value, u


@triton.jit(do_not_specialize=["n_tensors"])
def optimizer_step_kernel(
    addresses_ptr, sizes_ptr, firsts_ptr,  # (5, n_tensors), (n_tensors,), (n_tensors + 1,)
    trust_ptr,  # (n_tensors,) float32, read by "lamb update"
    partial_ptr,  # (2, n_programs) float32: sums of squares of master and direction, written by "lamb moments"
    lr_ptr, step_ptr, grad_scale_ptr, skip_ptr,  # float32 scalars
    n_tensors, gain1, gain2, log2_beta1, log2_beta2, eps, weight_decay,  # gain: 1 - beta
    PASS: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr, HAS_MASTER: tl.constexpr,
    ALIGNED: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if tl.load(skip_ptr) != 0.0:
        return
    tensor, first = find_chunk(firsts_ptr, n_tensors, TENSORS, CHUNK)
    size = tl.load(sizes_ptr + tensor)
    param_ptr = tensor_pointer(addresses_ptr, tensor, PARAM, ALIGNED)
    grad_ptr = tensor_pointer(addresses_ptr, n_tensors + tensor, GRAD, ALIGNED)
    master_ptr = tensor_pointer(addresses_ptr, 2 * n_tensors + tensor, MASTER, ALIGNED)
    SPLIT: tl.constexpr = MASTER == tl.int16
    exp_avg_ptr = tensor_pointer(addresses_ptr, 3 * n_tensors + tensor, tl.float32, ALIGNED)
    exp_avg_sq_ptr = tensor_pointer(addresses_ptr, 4 * n_tensors + tensor, tl.float32, ALIGNED)
    lr, grad_scale = tl.load(lr_ptr), tl.load(grad_scale_ptr)
    step = tl.load(step_ptr).to(tl.float64)  # 1 - beta^step loses all its digits in fp32 at the first steps
    correction1 = (1.0 - tl.exp2(step * log2_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp2(step * log2_beta2)).to(tl.float32)
    trust = tl.load(trust_ptr + tensor) if PASS == "lamb update" else 1.0
    master_squares = tl.zeros((BLOCK,), tl.float32)
    direction_squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first, tl.minimum(first + CHUNK, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= size:
            value, u = step_block(
                param_ptr, grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, at, size, lr, grad_scale,
                gain1, gain2, correction1, correction2, eps, weight_decay, trust, PASS, HAS_MASTER, SPLIT, True,
            )  # fmt: skip
        else:
            value, u = step_block(
                param_ptr, grad_ptr, master_ptr, exp_avg_ptr, exp_avg_sq_ptr, at, size, lr, grad_scale,
                gain1, gain2, correction1, correction2, eps, weight_decay, trust, PASS, HAS_MASTER, SPLIT, False,
            )  # fmt: skip
        if PASS == "lamb moments":
            master_squares += value * value
            direction_squares += u * u
    if PASS == "lamb moments":
        tl.store(partial_ptr + tl.program_id(0), tl.sum(master_squares, 0))
        tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.sum(direction_squares, 0))


@triton.jit(do_not_specialize=["n_programs"])
def trust_ratio_kernel(
    partial_ptr, firsts_ptr, trust_ptr,  # (2, n_programs), (n_tensors + 1,), (n_tensors,)
    n_programs, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tensor: |master| / |direction|, and 1 where one of them is 0."""
    tensor = tl.program_id(0)
    end = tl.load(firsts_ptr + tensor + 1)
    master_squares = tl.zeros((BLOCK,), tl.float32)
    direction_squares = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(tl.load(firsts_ptr + tensor), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        master_squares += tl.load(partial_ptr + at, mask=at < end, other=0.0)
        direction_squares += tl.load(partial_ptr + n_programs + at, mask=at < end, other=0.0)
    size, length = tl.sqrt_rn(tl.sum(master_squares, 0)), tl.sqrt_rn(tl.sum(direction_squares, 0))
    tl.store(trust_ptr + tensor, tl.where((size > 0.0) & (length > 0.0), size / length, 1.0))


@triton.jit(do_not_specialize=["n_tensors"])
def sum_squares_kernel(
    addresses_ptr, sizes_ptr, firsts_ptr,  # (1, n_tensors), (n_tensors,), (n_tensors + 1,)
    partial_ptr,  # (n_programs,) float32
    n_tensors,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tensor, first = find_chunk(firsts_ptr, n_tensors, TENSORS, CHUNK)
    size = tl.load(sizes_ptr + tensor)
    grad_ptr = tensor_pointer(addresses_ptr, tensor, GRAD, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first, tl.minimum(first + CHUNK, size), BLOCK):
        at = start + tl.arange(0, BLOCK)
        if start + BLOCK <= size:
            g = load_float(grad_ptr, at, size, True)
        else:
            g = load_float(grad_ptr, at, size, False)
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["n_partials"])
def norm_kernel(partial_ptr, out_ptr, n_partials, BLOCK: tl.constexpr):
    """One program: the square root of the partial sums' sum, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, n_partials, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < n_partials, other=0.0)
    tl.store(out_ptr, tl.sqrt_rn(tl.sum(total, 0)))


CAPTURED: list = []  # tables whose pinned copies CUDA graphs read again at every replay


def address_table(addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device):
    """Addresses, sizes and first programs on the device, how many programs there are, and the copies on the host."""
    programs = [-(-n // CHUNK) for n in sizes]  # cdiv is slow: a constexpr function
    firsts = [0, *accumulate(programs)]
    host = [torch.tensor(list(t), dtype=d) for t, d in
            ((addresses, torch.int64), (sizes, torch.int64), (firsts, torch.int32))]  # fmt: skip
    if device.type == "cuda":
        host = [t.pin_memory() for t in host]
    return [t.to(device, non_blocking=True) for t in host], sum(programs), host


kept_table = lru_cache(maxsize=256)(address_table)  # the addresses repeat from step to step


def table(*lists):
    """`address_table` for lists of equally many tensors, without the empty ones, and the constants of the launch."""
    full = [i for i, t in enumerate(lists[0]) if t.numel()]
    tensors = [group[i] for group in lists for i in full]
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("the optimiser's tensors must be contiguous")
    addresses = tuple(t.data_ptr() for t in tensors)
    sizes = tuple(lists[0][i].numel() for i in full)
    device = lists[0][0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing:  # a kept one may have been filled by a graph that has not run yet, or be dropped before this one is
        CAPTURED.append(address_table(addresses, sizes, device))
    on_device, programs, _ = CAPTURED[-1] if capturing else kept_table(addresses, sizes, device)
    options = {
        "ALIGNED": all(a % 16 == 0 for a in addresses), "TENSORS": triton.next_power_of_2(max(1, len(full))),
        "CHUNK": CHUNK, "num_warps": 4,
    }  # fmt: skip
    return on_device, len(full), programs, options


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def log2(beta: float) -> float:
    return math.log2(beta) if beta > 0.0 else -math.inf


def adamw_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    numbers = lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
    for launch, *_ in launches(params, grads, masters, exp_avgs, exp_avg_sqs, *numbers):
        launch("adamw", None, None)


def lamb_step(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    numbers = lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
    for launch, firsts, n_tensors, programs in launches(params, grads, masters, exp_avgs, exp_avg_sqs, *numbers):
        partial = torch.empty((2, programs), dtype=torch.float32, device=firsts.device)
        trust = torch.empty(n_tensors, dtype=torch.float32, device=firsts.device)
        launch("lamb moments", None, partial)
        trust_ratio_kernel[(n_tensors,)](partial, firsts, trust, programs, BLOCK=1024, num_warps=4)
        launch("lamb update", trust, None)


def launches(
    params, grads, masters, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay
):
    """For the tensors of each set of dtypes: launch(PASS, trust, partial), their first programs, the two counts."""
    owners = masters or params
    for param, grad, owner, *moments in zip(params, grads, owners, exp_avgs, exp_avg_sqs):
        split = param.dtype == torch.bfloat16 and owner.dtype == torch.int16
        if not split and owner.dtype != torch.float32 or any(t.dtype != torch.float32 for t in moments):
            raise ValueError("moments and masters must be float32 (masters of bfloat16 may be int16), and so must "
                             "parameters without masters")
        if any(t.shape != param.shape for t in (grad, owner, *moments)):
            raise ValueError("gradients, moments and masters must have the parameters' shapes")
    grads = [g.contiguous() for g in grads]
    dtypes = [tuple(t.dtype for t in of_one) for of_one in zip(params, grads, owners)]
    for kind in sorted(set(dtypes), key=str):
        of_kind = [i for i, of_one in enumerate(dtypes) if of_one == kind]
        lists = [[group[i] for i in of_kind] for group in (params, grads, owners, exp_avgs, exp_avg_sqs)]
        on_device, n_tensors, programs, options = table(*lists)
        split = kind[2] == torch.int16
        options |= {
            "PARAM": tl.int16 if split else triton_dtype(kind[0]), "GRAD": triton_dtype(kind[1]),
            "MASTER": tl.int16 if split else tl.float32, "HAS_MASTER": bool(masters),
        }  # fmt: skip

        def launch(which, trust, partial, on_device=on_device, n_tensors=n_tensors, programs=programs, options=options):
            optimizer_step_kernel[(programs,)](
                *on_device, trust, partial, lr, step, grad_scale, skip,
                n_tensors, 1 - beta1, 1 - beta2, log2(beta1), log2(beta2), eps, weight_decay, PASS=which, **options,
            )  # fmt: skip

        if programs:
            yield launch, on_device[2], n_tensors, programs


def grad_norm(grads):
    grads = [g.contiguous() for g in grads]
    parts = [grads[0].new_zeros(1, dtype=torch.float32)]
    for dtype in sorted({g.dtype for g in grads}, key=str):
        on_device, n_tensors, programs, options = table([g for g in grads if g.dtype == dtype])
        if programs:
            parts.append(torch.empty(programs, dtype=torch.float32, device=grads[0].device))
            sum_squares_kernel[(programs,)](*on_device, parts[-1], n_tensors, GRAD=triton_dtype(dtype), **options)
    partial = parts[-1] if len(parts) == 2 else torch.cat(parts)
    out = torch.empty((), dtype=torch.float32, device=partial.device)
    norm_kernel[(1,)](partial, out, partial.numel(), BLOCK=1024, num_warps=4)
    return out
