"""Triton's interpreter (TRITON_INTERPRET=1) made strict enough to be believed: kernels run on CPU tensors, and

- bf16 is right: casts round to nearest even, products are formed from the exact values and added in fp32 (the stock
  interpreter computes on the bit patterns and truncates, without an error);
- arithmetic in bf16 or fp16 is an error: the project's kernels compute in fp32, and only load, cast, choose, multiply
  matrices and store in sixteen bits;
- every address must lie inside a tensor of the launch; masked-off elements without `other` are garbage (NaN, -1);
- no program may touch what another one wrote, nor write what another one read, and atomics are an error: so the
  result cannot depend on the order in which a GPU runs the programs.

Not modelled: warps, layouts, pipelining, and the GPU's approximate exp2 and reciprocal. The patched classes are
private to Triton; the names used here are those of 3.7 to 3.9.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

HALF = (tl.bfloat16, tl.float16)
NOBODY, SEVERAL = -1, -2  # in a shadow page, beside the number of the one program that touched the element
PAGE = np.uint64(1 << 16)


def to_float32(handle: TensorHandle) -> np.ndarray:
    """The values of a bf16 or any other float block in fp32; the interpreter holds bf16 as uint16 bit patterns."""
    if handle.dtype.scalar == tl.bfloat16:
        return (np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return handle.data.astype(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


reached_by_address: list = []  # tensors that the next launch reaches without their being arguments


class Memory:
    """The tensors of the running launch, and which program read and wrote each two bytes of them."""

    def __init__(self, arguments):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in [*arguments, *reached_by_address] if hasattr(t, "untyped_storage")}  # fmt: skip
        self.first = np.array(sorted(storages), dtype=np.uint64)
        self.end = self.first + np.array([storages[int(p)] for p in self.first], dtype=np.uint64)
        self.pages: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by address / PAGE: last writer, last reader

    def check(self, builder, pointers: TensorHandle, mask: np.ndarray, is_store: bool) -> None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(np.broadcast_to(mask, np.shape(pointers.data)))]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        storage = np.searchsorted(self.first, addresses, side="right") - 1
        outside = (storage < 0) | (addresses + np.uint64(size) > self.end[np.maximum(storage, 0)])
        what = "store" if is_store else "load"
        if outside.any():
            raise IndexError(f"{what} out of bounds: {outside.sum()} addresses, program {builder.grid_idx}")
        if is_store and np.unique(addresses).size != addresses.size:
            raise RuntimeError(f"race: program {builder.grid_idx} stores twice to one address in one instruction")
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        for page in np.unique(addresses // PAGE):
            if int(page) not in self.pages:
                untouched = np.full(int(PAGE) // 2, NOBODY, np.int32)
                self.pages[int(page)] = untouched, untouched.copy()
            written, read = self.pages[int(page)]
            at = (addresses[addresses // PAGE == page] % PAGE // 2).astype(np.int64)
            if touched_by_another(written[at], program) or (is_store and touched_by_another(read[at], program)):
                raise RuntimeError(f"race: program {builder.grid_idx} makes a {what} where another program was")
            if is_store:
                written[at] = program
            else:
                read[at] = np.where((read[at] == NOBODY) | (read[at] == program), program, SEVERAL)


def touched_by_another(shadow: np.ndarray, program: int) -> bool:
    return bool(((shadow != NOBODY) & (shadow != program)).any())


def install() -> None:
    """Patch the interpreter of this process. TRITON_INTERPRET=1 must have been set before triton was imported."""
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    stock = {name: getattr(InterpreterBuilder, name) for name in (
        "binary_op", "unary_op", "ternary_op", "create_fma", "cast_impl", "create_fp_to_fp", "create_dot",
        "create_masked_load", "create_masked_store",
    )}  # fmt: skip

    def refuse_half(*handles):
        if any(not isinstance(h.dtype, tl.pointer_type) and h.dtype.scalar in HALF for h in handles):
            raise TypeError("arithmetic in sixteen bits: cast to float32 first")

    def binary_op(self, lhs, rhs, op):
        refuse_half(lhs, rhs)
        return stock["binary_op"](self, lhs, rhs, op)

    def unary_op(self, arg, op):
        refuse_half(arg)
        return stock["unary_op"](self, arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where:
            refuse_half(lhs, rhs, other)
        return stock["ternary_op"](self, lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        refuse_half(x, y, z)
        return stock["create_fma"](self, x, y, z)

    def cast(self, source, target, *rounding_mode):
        to, of = target.scalar, source.dtype.scalar
        if to == tl.bfloat16 and of != to:
            return TensorHandle(to_bfloat16(to_float32(source)), to)
        if of == tl.bfloat16 and to != of:
            return TensorHandle(to_float32(source).astype(interpreter._get_np_dtype(to)), to)
        return stock["create_fp_to_fp" if rounding_mode else "cast_impl"](self, source, target, *rounding_mode)

    def create_dot(self, a, b, d, *options):
        if d.dtype.scalar != tl.float32:
            raise TypeError("a matrix product accumulates in float32")
        return TensorHandle(np.matmul(to_float32(a), to_float32(b)) + d.data, tl.float32)

    def create_masked_load(self, pointers, mask, other, *options):
        self.memory.check(self, pointers, mask.data, is_store=False)
        if other is None:
            dtype = interpreter._get_np_dtype(pointers.get_element_ty())
            garbage = np.full(pointers.data.size * dtype.itemsize, 0xFF, np.uint8).view(dtype)
            other = TensorHandle(garbage.reshape(pointers.data.shape), pointers.get_element_ty())
        return stock["create_masked_load"](self, pointers, mask, other, *options)

    def create_masked_store(self, pointers, value, mask, *options):
        self.memory.check(self, pointers, mask.data, is_store=True)
        return stock["create_masked_store"](self, pointers, value, mask, *options)

    def refuse_atomic(self, *_):
        raise TypeError("atomics make the result depend on the order of the programs")

    start = GridExecutor._init_args_hst

    def init_arguments(self, arguments, kwargs):
        arguments, kwargs = start(self, arguments, kwargs)
        InterpreterBuilder.memory = Memory([*arguments, *kwargs.values()])
        return arguments, kwargs

    GridExecutor._init_args_hst = init_arguments
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(to_bfloat16(np.array([value])), tl.bfloat16)
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = refuse_atomic
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_to_fp = cast
    for patch in (
        binary_op, unary_op, ternary_op, create_fma, create_dot, create_masked_load, create_masked_store
    ):  # fmt: skip
        setattr(InterpreterBuilder, patch.__name__, patch)


def follow_addresses() -> None:
    """The optimiser's launches get a table of addresses: note whose they are."""
    from bertfast.kernels import optimizer_step

    table = optimizer_step.table

    def noting_table(*lists):
        reached_by_address[:] = [t for tensors in lists for t in tensors]
        return table(*lists)

    optimizer_step.table = noting_table
