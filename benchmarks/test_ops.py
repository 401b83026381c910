"""The ops under pytest-benchmark (`pytest benchmarks`): its statistics, histograms and stored comparisons.

Forward and backward together, grouped by op, shape and dtype, each checked against the definition first. `bertfast
bench ops` is the one that takes turns and gives shares of the peak.
"""

import pytest
import torch
from bertfast.benchmarks import ops, roofline
from bertfast.benchmarks.cases import CASES

TABLE = [(op, shape, dtype) for op, shapes in ops.TABLES["quick"].items() for shape in shapes for dtype in ops.dtypes()]


@pytest.mark.parametrize("contender", ["bertfast", "eager", "compiled"])
@pytest.mark.parametrize(("op", "shape", "dtype"), TABLE, ids=[f"{o}-{ops.shape_name(s)}-{d}" for o, s, d in TABLE])
def test_op(benchmark, op, shape, dtype, contender):
    torch._dynamo.reset()
    make = {"bertfast": lambda: CASES[op].fused, "eager": lambda: ops.BEST[op],
            "compiled": lambda: torch.compile(ops.BEST[op], dynamic=False)}
    tensors, truth = ops.prepare(op, shape, dtype)
    side = ops.side(make[contender](), CASES[op], tensors)
    refused = ops.refusal(contender, side, truth, CASES[op], dtype)
    assert not refused, refused
    p = 0.1 if CASES[op].dropout else 0.0
    benchmark.group = f"{op} {ops.shape_name(shape)} {dtype}"
    benchmark.pedantic(side.forward_and_backward, (p,), rounds=7, iterations=3, warmup_rounds=2)
    costs = roofline.COSTS[op](shape, ops.DTYPES[dtype].itemsize)
    for unit, work in (("GFLOP/s", sum(c.flops for c in costs)), ("GB/s", sum(c.bytes for c in costs))):
        benchmark.extra_info[unit] = round(work / benchmark.stats.stats.median / 1e9, 1)
