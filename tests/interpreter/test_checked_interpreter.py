"""The interpreter that the other tests believe: each fault it must catch, in a kernel of a few lines."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < (n + 1 if FAULT == "bound" else n)
    if FAULT == "no other":
        x = tl.load(x_ptr + at, mask=inside)
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if FAULT == "sixteen bits":
        x = x + x
    if FAULT == "atomic":
        tl.atomic_add(y_ptr + at, x, mask=inside)
    if FAULT == "race":
        at = at - tl.program_id(0)  # overlaps the program before
        inside = at < n
    if FAULT == "twice":
        at = at // 2
    if FAULT == "sum":
        tl.store(y_ptr + tl.program_id(0), tl.sum(x.to(tl.float32), 0).to(tl.bfloat16))
    else:
        tl.store(y_ptr + at, (x.to(tl.float32) * 3.0).to(tl.bfloat16), mask=inside)


def launch(fault, n=30):
    x = torch.linspace(-2, 2, n).bfloat16()
    y = torch.zeros(n, dtype=torch.bfloat16)
    scale_kernel[(triton.cdiv(n, 8),)](x, y, n, FAULT=fault, BLOCK=8)
    return x, y


def test_rounds_to_nearest_even():
    x, y = launch("")
    assert torch.equal(y, (x.float() * 3.0).bfloat16())


@pytest.mark.parametrize(
    ("fault", "message"),
    [("bound", "bounds"), ("race", "race"), ("twice", "twice"), ("sixteen bits", "sixteen"), ("atomic", "atomics")],
)
def test_faults_are_errors(fault, message):
    with pytest.raises(InterpreterError, match=message):
        launch(fault)


def test_masked_load_without_other_is_garbage():
    _, y = launch("sum")
    assert torch.isfinite(y[:4]).all()
    x = torch.ones(30, dtype=torch.bfloat16)
    out = torch.zeros(30, dtype=torch.bfloat16)
    scale_kernel[(4,)](x, out, 30, FAULT="no other", BLOCK=8)
    assert torch.equal(out, torch.full_like(out, 3.0))  # the garbage was not stored


def test_dot_accumulates_in_fp32():
    a, b = torch.randn(16, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    k = tl.arange(0, 64)
    a = tl.load(a_ptr + i[:, None] * 64 + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 16 + i[None, :])
    tl.store(out_ptr + i[:, None] * 16 + i[None, :], tl.dot(a, b))
