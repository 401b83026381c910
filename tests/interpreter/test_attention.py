"""Attention beyond the table of ops: every configuration's kernels and tiles, strides, cross-attention, far rows."""

import importlib

import numpy as np
import pytest
import torch
from bertfast.kernels import attention as kernels

from bertfast import ops
from bertfast.ops import _define

reference = importlib.import_module("bertfast.ops.attention")  # the package's attribute of that name is the function

SEED = torch.tensor([-0x1234_5678_9ABC])


def compare(q, k, v, lengths_q, lengths_k, mask_mode, p, row_key=None, packed=False):
    """Forward and backward of the launchers against the reference in fp64, to the roundings of fp32."""
    bounds = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    prefix = torch.tensor([n // 2 for n in lengths_k], dtype=torch.int32)
    layout = (*bounds, max(lengths_q), max(lengths_k), q.shape[-1] ** -0.5, mask_mode, prefix, p, SEED, row_key, 77)
    wide = [t.double() for t in (q, k, v)]
    out, lse = kernels.attention_fwd(q, k, v, *layout)
    expected = reference._attention_fwd(*wide, *layout)
    dout = torch.randn(q.shape)
    saved = dout, q, k, v, out, lse
    if packed:
        gradients = kernels.attention_packed_bwd(*saved, *layout).unbind(1)
    else:
        dq, dkv = kernels.attention_bwd(*saved, *layout)
        gradients = dq, *dkv.unbind(1)
    expected_dq, expected_dkv = reference._attention_bwd(dout.double(), *wide, *expected, *layout)
    for name, got, want in zip(
        ("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), (*expected, expected_dq, *expected_dkv.unbind(1))
    ):
        torch.testing.assert_close(got, want.float(), rtol=2e-5, atol=5e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


def packed_qkv(rows, heads, d):
    return torch.randn(rows, 3, heads, d).unbind(1)


def full_core(values):
    """All values, of which only the first is part of the core."""
    return [values[0], *(pytest.param(v, marks=pytest.mark.full) for v in values[1:])]


@pytest.mark.parametrize("d", full_core([64, 16, 24, 48, 80, 96, 128]))
@pytest.mark.parametrize("arch", full_core([80, 86, 90, 100, 120, "gfx942"]))
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_configuration(monkeypatch, arch, d, element_size):
    """The tiles that each architecture gets, in fp32; sequences shorter and longer than a tile, for both backwards."""
    chosen = kernels.configuration

    def choose(kernel, _, head_size, __, *rest):
        return chosen(kernel, arch, head_size, element_size, *rest)

    monkeypatch.setattr(kernels, "configuration", choose)
    q, k, v = packed_qkv(140, 1, d)
    compare(q, k, v, [7, 129], [7, 129], 0, 0.2, packed=True)
    compare(q[:40], k[:40], v[:40], [7, 30], [7, 30], 0, 0.2, packed=True)


@pytest.mark.parametrize("longest", [40, 140], ids=["whole", "split"])
@pytest.mark.parametrize("mask_mode", [0, 1, 2], ids=["full", "causal", "prefix"])
def test_cross_attention_with_keys_of_other_lengths(mask_mode, longest):
    lengths_q, lengths_k = [5, 0, 33, 1], [70, 3, longest, 1] if longest > 40 else [40, 3, 33, 1]
    if longest > 40:
        lengths_q[2] = 140
    q, (k, v) = torch.randn(sum(lengths_q) + 3, 2, 32), torch.randn(2, sum(lengths_k) + 2, 2, 32)
    positions = [
        torch.randperm(m)[:n].sort().values if m >= n else torch.arange(n) for n, m in zip(lengths_q, lengths_k)
    ]
    row_key = torch.cat([p + (b + 3 << 32) for b, p in enumerate(positions)] + [torch.zeros(3, dtype=torch.int64)])
    compare(q, k, v, lengths_q, lengths_k, mask_mode, 0.1, row_key)


def test_queries_without_a_key():
    q, (k, v) = torch.randn(9, 1, 16), torch.randn(2, 4, 1, 16)
    compare(q, k, v, [5, 4], [0, 4], 0, 0.0)


@pytest.mark.parametrize("layout", ["heads first", "padded rows", "odd rows"])
def test_strides(layout):
    if layout == "heads first":
        q, k, v = (torch.randn(2, 50, 32).transpose(0, 1) for _ in range(3))
    else:  # another stride for each
        widths = (80, 88, 96) if layout == "padded rows" else (75, 69, 83)
        q, k, v = (torch.randn(50, width)[:, 5 : 5 + 64].unflatten(1, (2, 32)) for width in widths)
    compare(q, k, v, [20, 30], [20, 30], 0, 0.2)


def test_only_aligned_rows_are_read_16_bytes_at_a_time():
    x = torch.randn(4, 80)
    views = (x[:, first : first + 64].unflatten(1, (2, 32)) for first in (0, 4, 1))
    assert [kernels.vector_and_strides(view) for view in views] == [(4, [20, 8]), (4, [20, 8]), (1, [80, 32])]


def test_rows_beyond_int32():
    """Row offsets past 2^31 elements, in memory that is reserved and never touched in between."""
    stride = 2**29
    reserved = [torch.from_numpy(np.zeros(4 * stride + 64, np.float16)) for _ in range(3)]
    q, k, v = (t.as_strided((5, 1, 16), (stride, 16, 1)) for t in reserved)
    for t in (q, k, v):
        t.copy_(torch.randn(5, 1, 16))
    near = [t.contiguous() for t in (q, k, v)]
    bounds = torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.int32)
    layout = bounds, bounds, 1, 1, 0.25, 0, None, 0.0, None, None, 0
    assert torch.equal(kernels.attention_fwd(q, k, v, *layout)[0], kernels.attention_fwd(*near, *layout)[0])


def test_what_the_kernels_do_not_do_is_refused_by_them():
    q, k, v = packed_qkv(4, 1, 8)
    layout = [torch.tensor([0, 4]).int()] * 2
    with pytest.raises(NotImplementedError, match="head size"):
        kernels.attention_fwd(q, k, v, *layout, 4, 4, 1.0, 0, None, 0.0, None, None, 0)
    q, k, v = packed_qkv(4, 1, 16)
    with pytest.raises(NotImplementedError, match="positive scale"):
        kernels.attention_fwd(q, k, v, *layout, 4, 4, -1.0, 0, None, 0.0, None, None, 0)
    with pytest.raises(NotImplementedError, match="too far apart"):
        kernels.attention_fwd(q, k, v, *layout, 2**27, 4, 1.0, 0, None, 0.0, None, None, 0)


def test_the_reference_does_what_the_kernels_do_not():
    qkv, bounds = torch.randn(9, 3, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    sides = [qkv.clone().requires_grad_(), qkv.double().requires_grad_()]
    _define._warn_of_lack.cache_clear()
    with pytest.warns(UserWarning, match="a head size from 16 to 128, got 8; the slow reference runs"):
        outs = [ops.attention_packed(side, bounds, 5, p=0.1, seed=SEED) for side in sides]
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(outs[0], outs[1].float())
    torch.testing.assert_close(sides[0].grad, sides[1].grad.float())
