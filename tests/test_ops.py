"""All fused ops against fp64 truth, in one table, by the rule of the parity contract; whatever runs on this machine."""

import copy
import ctypes
import math
import warnings
from unittest.mock import Mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from bertfast.benchmarks.cases import CASES, SEED, STREAM, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from bertfast import BertConfig, BertForPreTraining, ops
from bertfast.ops import _define, optimizer_step
from bertfast.ops.dropout import keep_mask, keep_scale, philox, threshold
from bertfast.ops.few_rows_linear import most_rows, takes
from bertfast.ops.gemm import suits
from bertfast.ops.linear import joined_linear, linear
from bertfast.ops.masked_vocab_projection import GradientSink
from bertfast.optim import Optimizer

needs_extension = pytest.mark.skipif(not ops.backends()["add_layer_norm_fwd"]["cpu"].startswith("C++"),
                                     reason="the C++ extension is not loaded")
ALL = [(c, shape, p) for c in CASES.values() for shape in c.shapes for p in ([0.0, 0.1] if c.dropout else [0.0])]
IDS = [f"{case.name}-{shape}-p{p}".replace(" ", "") for case, shape, p in ALL]


def assert_no_further(name: str, fused, eager, truth) -> None:
    """The fused op may not be further from the truth than the eager op in the same dtype, plus two units in the last
    place of the largest value (both round their result once; which way differs). In fp32 it is four: there the order of
    a sum is all the difference, and single elements were seen up to 2.9 units beyond eager's worst."""
    assert fused.shape == truth.shape and torch.isfinite(fused).all(), name
    if truth.numel() == 0:
        return
    error = (fused.double() - truth).abs().max().item()
    allowed = (eager.double() - truth).abs().max().item()
    ulps = 4 if fused.dtype == torch.float32 else 2
    tiny = ulps * torch.finfo(fused.dtype).eps * truth.abs().max().item() + 1e-30
    assert error <= allowed + tiny, f"{name}: error {error:.3g}, eager {allowed:.3g} + {tiny:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("case", "shape", "p"), ALL, ids=IDS)
def test_error_not_above_eager(case, shape, p, dtype):
    tensors = case.inputs(shape, dtype)
    truth = run(case.eager, case, case.inputs(shape, torch.float64), p)
    eager, fused, again = (run(call, case, tensors, p) for call in (case.eager, case.fused, case.fused))
    for name in truth:
        assert_no_further(name, fused[name], eager[name], truth[name])
        assert torch.equal(again[name], fused[name]), f"{name} differs from run to run"


@pytest.mark.parametrize(("case", "shape"), [(c, c.shapes[1]) for c in CASES.values()], ids=list(CASES))
def test_fp16_and_non_contiguous_inputs(case, shape):
    """In fp16 by the references, which also run where no kernel is built."""
    tensors = case.inputs(shape, torch.float16)
    for p in (0.0, 0.1) if case.dropout else (0.0,):
        truth = run(case.eager, case, case.inputs(shape, torch.float64), p)
        for name, value in run(case.fused, case, tensors, p).items():
            scale = truth[name].abs().max()
            assert (value.double() - truth[name]).abs().max() <= 8e-3 * scale, name  # fp16 eps 1e-3, a few roundings
    contiguous = case.inputs(shape, torch.float32)
    strided = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in contiguous.items()}
    for name, value in run(case.fused, case, strided, 0.0).items():
        torch.testing.assert_close(value, run(case.fused, case, contiguous, 0.0)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["add_layer_norm", "bias_gelu", "gelu_layer_norm", "embedding_sum"])
def test_many_rows_as_few_at_a_time(name, dtype):
    """Rows of more bytes than the caches hold are read and written another way: the same rows, bit for bit."""
    case, H = CASES[name], 1024
    rows = (64 << 20) // (H * dtype.itemsize) + 3  # not a multiple of the rows taken together
    tensors = case.inputs((rows, H, 99) if name == "embedding_sum" else (rows, H), dtype)
    p, pieces = 0.1 if case.dropout else 0.0, []
    ulps = 16 if name == "embedding_sum" and dtype == torch.float32 else 2  # a table's row is summed in one chain
    whole = run(case.fused, case, tensors, p)
    for first in range(0, rows, 200):
        own = {n: t[first : first + 200] if t.dim() and t.shape[0] == rows else t for n, t in tensors.items()}
        pieces.append(run(case.fused, case, own, p))
    for n, value in whole.items():
        if value.shape[0] == rows:
            assert torch.equal(value, torch.cat([piece[n] for piece in pieces])), n
        else:
            scale = sum(piece[n].double().abs() for piece in pieces).max()
            total = sum(piece[n].double() for piece in pieces)
            assert ((value.double() - total).abs() <= ulps * torch.finfo(value.dtype).eps * scale).all(), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("words", [40, 700])
def test_a_new_word_table_is_the_one_that_was_zeros(words, dtype):
    """Every row is written, those of words that are not there and of the padding too."""
    T, H = 200, 1024
    t = CASES["embedding_sum"].inputs((T, H, words), dtype)
    t["input_ids"][::9], t["input_ids"][5] = 0, words - 1
    rest = (t["dy"], t["input_ids"], t["position_ids"], t["token_type_ids"], t["word"], t["position"], t["token_type"],
            t["weight"], torch.randn(T), torch.rand(T) + 0.5, 0, 0.1, t["seed"], t["row_key"], STREAM)
    before, allocator = torch.get_num_threads(), ctypes.CDLL(None)
    allocator.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: no fresh pages, which are zeros
    allocator.mallopt(-6, 0x5A)  # M_PERTURB: new memory is full of it
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            zeros = torch.zeros(words, H, dtype=dtype)
            torch.ops.bertfast.embedding_sum_bwd_into(*rest, zeros)
            new = torch.ops.bertfast.embedding_sum_bwd(*rest)[0]
            assert torch.equal(new, zeros) and not new[0].any() and new[words - 1].any()
    finally:
        allocator.mallopt(-6, 0)
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["add_layer_norm", "bias_gelu", "gelu_layer_norm", "embedding_sum"])
def test_rows_shared_out_unevenly_among_threads(name):
    case, before, found = CASES[name], torch.get_num_threads(), []
    tensors = case.inputs((659, 256, 9999) if name == "embedding_sum" else (659, 256), torch.float64)
    for threads in (1, 5):
        torch.set_num_threads(threads)
        found.append(run(case.fused, case, tensors, 0.1 if case.dropout else 0.0))
    torch.set_num_threads(before)
    for n, value in found[0].items():
        torch.testing.assert_close(found[1][n], value, msg=n)


@pytest.mark.parametrize("offset", [0.5, 1.0, 2.0, 30.0, 300.0])
def test_layer_norm_of_rows_far_from_zero(offset):
    """A mean that is large beside the deviation costs no digits of the variance."""
    case = CASES["add_layer_norm"]

    def inputs(dtype):
        tensors = case.inputs((6, 768), torch.float32)
        tensors["x"] = tensors["x"] + offset * torch.tensor([1.0, -1.0, 1.0, 0.0, 2.0, -0.1])[:, None]
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    truth = run(case.eager, case, inputs(torch.float64), 0.0)
    eager, fused = (run(call, case, inputs(torch.float32), 0.0) for call in (case.eager, case.fused))
    for n in truth:
        assert_no_further(n, fused[n], eager[n], truth[n])


@pytest.mark.parametrize("name", ["bias_gelu", "gelu_layer_norm"])
@pytest.mark.parametrize(("low", "high"),
                         [(-3.5, -3.0), (-5.0, -4.0), (-5.6, -5.0), (-6.5, -5.6), (-20.0, -6.5), (3.0, 9.0)])
def test_gelu_of_rows_far_from_zero(low, high, name):
    """Where GELU is next to nothing, it and its derivative are no further from the truth than eager's either."""
    case = CASES[name]

    def inputs(dtype):
        tensors = case.inputs((64, 1024), torch.float32)
        where = torch.rand(64, 1024, generator=torch.Generator().manual_seed(5))
        tensors |= {"x": low + (high - low) * where, "bias": torch.zeros(1024)}
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    truth = run(case.eager, case, inputs(torch.float64), 0.0)
    eager, fused = (run(call, case, inputs(torch.float32), 0.0) for call in (case.eager, case.fused))
    for n in truth:
        assert_no_further(n, fused[n], eager[n], truth[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("logit", [20.0, 50.0, 1e3, 1e8])
def test_sure_predictions(logit, dtype):
    """Their losses are next to nothing, not below it, and so are the gradients."""
    torch.manual_seed(1)
    weight, labels = torch.randn(2000, 64).to(dtype), torch.arange(64) * 7
    chosen = weight[labels].double()
    hidden = (chosen / chosen.square().sum(1, keepdim=True) * logit).to(dtype).requires_grad_()
    bias = torch.zeros(2000, dtype=dtype, requires_grad=True)
    exact = hidden.detach().double().requires_grad_()
    loss, _, n_correct = ops.masked_vocab_projection(hidden, weight, bias, labels, torch.tensor(1.0))
    truth = F.cross_entropy(F.linear(exact, weight.double()), labels, reduction="sum")
    loss.backward()
    truth.backward()
    assert n_correct == 64 and bias.grad.isfinite().all()
    torch.testing.assert_close(loss.double(), truth, rtol=0.02, atol=1e-30)
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=0.0, atol=0.02 * exact.grad.abs().max() + 1e-30)


@pytest.mark.parametrize("sure", [5.0, 12.0])
def test_bias_of_a_frequent_and_sure_label(sure):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(300, 64), torch.randn(5000, 64) * 0.1, torch.zeros(5000)
    hidden[:, 0], weight[11, 0] = 1.0, sure
    labels = torch.full((300,), 11)
    labels[:5] = torch.arange(50, 55)

    def gradient(project, dtype):
        leaf = bias.to(dtype, copy=True).requires_grad_()
        project(hidden.to(dtype), weight.to(dtype), leaf).backward()
        return leaf.grad

    eager = lambda h, w, b: F.cross_entropy(F.linear(h, w, b), labels)
    fused = gradient(lambda h, w, b: ops.masked_vocab_projection(h, w, b, labels)[0], torch.float32)
    truth, plain = gradient(eager, torch.float64), gradient(eager, torch.float32)
    assert_no_further("the label's", fused[11:12], plain[11:12], truth[11:12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("learns", [False, True])
def test_right_predictions_are_counted(learns, dtype):
    """The likeliest word is right, the second likeliest is not, and of equally likely ones the first is."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((60, 64), (2000, 64), (2000,)))
    weight[1999], bias[1999] = weight[3], bias[3]
    hidden[:20] = weight[3] * 2  # whose likeliest words are both
    two = F.linear(hidden.double(), weight.double(), bias.double()).topk(2).indices
    labels = torch.where(torch.arange(60) % 2 == 0, two[:, 0], two[:, 1])
    labels[:10], labels[10:20] = 3, 1999
    labels[::5] = -100
    right = ((labels == two[:, 0]) & (torch.arange(60) >= 20)).sum() + 8
    _, n_masked, n_correct = ops.masked_vocab_projection(hidden.requires_grad_(learns), weight, bias, labels)
    assert (n_masked, n_correct) == (48, right)


@needs_extension
@pytest.mark.parametrize("into", [False, True], ids=["own", "a sink"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_more_logits_than_are_kept_at_once(dtype, into):
    """A call that takes its rows in several chunks is the sum of calls that take them in one."""
    torch.manual_seed(0)
    rows, vocab = (1500, 24_000) if dtype == torch.float32 else (3000, 24_000)
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 16), (vocab, 16), (vocab,)))
    labels = torch.randint(0, vocab, (rows,))
    labels[::7] = -100

    def project(first, end):
        h, w, b = (t.clone().requires_grad_() for t in (hidden[first:end], weight, bias))
        sink = GradientSink(torch.full((vocab, 16), torch.nan)) if into else None
        loss, n_masked, n_correct = ops.masked_vocab_projection(h, w, b, labels[first:end], torch.tensor(1.0), sink)
        loss.backward()
        dweight = sink.buffer if into else w.grad
        return [loss.detach(), n_masked, n_correct, dweight, b.grad], h.grad

    whole, dhidden = project(0, rows)
    parts = [project(first, first + 500) for first in range(0, rows, 500)]
    assert torch.equal(dhidden, torch.cat([d for _, d in parts]))
    for found, *pieces in zip(whole, *(sums for sums, _ in parts)):
        eps = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
        found, pieces = found.double(), [p.double() for p in pieces]
        assert (found - sum(pieces)).abs().max() <= 4 * eps * sum(p.abs() for p in pieces).max()


def test_a_step_between_forward_and_backward_is_noticed():
    for step in (ops.adamw_step, ops.lamb_step):
        weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
        y = (x @ weight).sum()
        one = torch.tensor(1.0)
        moments = [torch.zeros(4, 4)], [torch.zeros(4, 4)]
        step([weight], [torch.ones(4, 4)], [], *moments, one, one, one, torch.tensor(0.0))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_forward_mode_is_an_error_not_a_zero():
    hidden, weight, bias, labels = torch.randn(3, 64), torch.randn(9, 64), torch.randn(9), torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: ops.masked_vocab_projection(x, weight, bias, labels)[0], (hidden,), (hidden,))
    layer = torch.nn.Linear(64, 64).eval()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        tangent = forward_ad.unpack_dual(linear(dual, layer)[0]).tangent
        torch.testing.assert_close(tangent, F.linear(torch.ones_like(hidden), layer.weight))


@pytest.mark.parametrize("call", [
    lambda x, weight: ops.gemm(x, weight, None, False, True), lambda x, weight: ops.few_rows_linear(x, [weight], []),
], ids=["gemm", "few_rows_linear"])  # fmt: skip
def test_products_without_a_gradient_refuse_to_be_constants(call):
    x, weight = torch.randn(5, 64), torch.randn(64, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        call(x, weight)
    with torch.no_grad():
        torch.testing.assert_close(call(x, weight), x @ weight.T)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivative"):
            call(forward_ad.make_dual(x, torch.ones_like(x)), weight)


def test_dropout_numbers_256_heads():
    q, cu = torch.randn(2, 257, 8), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="256 heads apart, not 257"):
        ops.attention(q, q, q, cu, cu, 2, 2, p=0.1, seed=torch.tensor([1]))


def test_the_same_tensor_twice_compiles():
    q, cu = torch.randn(5, 2, 8, requires_grad=True), torch.tensor([0, 2, 5], dtype=torch.int32)
    weight, bias = torch.ones(16), torch.zeros(16)

    def twice(q):
        y = ops.attention(q, q, q, cu, cu, 3, 3).flatten(1)
        return ops.add_layer_norm(y, None, y, weight, bias).square().sum()

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q), q), torch.autograd.grad(twice(q), q))


GRADCHECK_SHAPES = {
    "masked_vocab_projection": (5, 6, 11),
    "attention": ((4, 0, 3), 1, 2, 8),
    "rows": (5, 7),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_gradcheck(case):
    kind = "attention" if case.name.startswith("attention") else case.name
    tensors = case.inputs(GRADCHECK_SHAPES.get(kind, GRADCHECK_SHAPES["rows"]), torch.float64)
    names = case.differentiable

    def call(*values):
        return case.fused({**tensors, **dict(zip(names, values))}, 0.2 if case.dropout else 0.0)

    # the padding row gets no gradient by design: look at ids that are not 0
    if "input_ids" in tensors:
        tensors["input_ids"] = tensors["input_ids"].clamp(min=1)
    assert torch.autograd.gradcheck(call, tuple(tensors[n].requires_grad_() for n in names))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_compiles_without_graph_break(case):
    tensors = case.inputs(case.shapes[0], torch.float32)
    p = 0.1 if case.dropout else 0.0
    if case.name.startswith("attention"):  # max_seqlen is a constant of the phase, not read from the device
        fixed = dict(tensors)
        compiled = torch.compile(lambda qkv: case_attention(case, {**fixed, "qkv": qkv}, p), fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tensors["qkv"]), case_attention(case, tensors, p))
        return
    compiled = torch.compile(case.fused, fullgraph=True)
    eager, fused = run(case.fused, case, tensors, p), run(compiled, case, tensors, p)
    for name in eager:
        torch.testing.assert_close(fused[name], eager[name])


def case_attention(case, t, p):
    return ops.attention_packed(
        t["qkv"], t["cu_seqlens"], 64, mask_mode=case.name.split("_")[1], prefix_lens=t["prefix_lens"], p=p,
        seed=t["seed"], row_key=t["row_key"], stream=STREAM,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 18, 128])
@pytest.mark.parametrize(("outputs", "inputs", "n"), [(4, 32, 1), (36, 384, 3), (64, 416, 3), (384, 1536, 2)])
def test_few_rows_linear_is_no_further_than_the_gemm(rows, outputs, inputs, n, dtype):
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).to(dtype)
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(n)]
    biases = [torch.randn(outputs).to(dtype) for _ in range(n)]
    for given in (biases, []):
        results = []
        for cast in (torch.float64, dtype):
            padded = [b.to(cast) for b in given] or [None] * n
            results.append(torch.cat([F.linear(x.to(cast), w.to(cast), b) for w, b in zip(weights, padded)], 1))
        assert_no_further("y", ops.few_rows_linear(x, weights, given), results[1], results[0])


def test_few_rows_are_taken_in_inference_only():
    x, layer = torch.randn(5, 64), torch.nn.Linear(64, 8).eval()
    there = torch._C._dispatch_has_kernel_for_dispatch_key("bertfast::few_rows_linear", "CPU")
    with torch.no_grad():
        assert takes(x, layer) == there
        assert not takes(torch.randn(most_rows(torch.float32) + 1, 64), layer)
        assert not takes(x, torch.nn.Linear(64, 7).eval())
        assert not takes(torch.randn(5, 63), torch.nn.Linear(63, 8).eval())
        assert not takes(x.bfloat16(), layer) and not takes(x.half(), copy.deepcopy(layer).half())
        assert not takes(x, copy.deepcopy(layer).train())
        with torch.autocast("cpu", torch.bfloat16):
            assert not takes(x, layer)
    assert not takes(x, layer)  # a gradient may be wanted
    linear(x, layer)[0].sum().backward()
    assert layer.weight.grad is not None


HAS_GEMM = torch._C._dispatch_has_kernel_for_dispatch_key("bertfast::gemm", "CPU")
HAS_BF16_GEMM = HAS_GEMM and torch.ops.bertfast.gemm_multiplies_bf16()
GEMM_SHAPES = [(0, 64, 64), (5, 0, 64), (1, 64, 128), (5, 192, 64), (6, 128, 192), (97, 64, 640), (131, 320, 64),
               (200, 1024, 192), (300, 1600, 448)]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), GEMM_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemm_is_no_further_than_pytorchs_and_the_same_for_any_number_of_threads(rows, inputs, outputs, dtype):
    torch.manual_seed(rows)
    matrix = lambda *shape: torch.randn(*shape).to(dtype)
    x, dy, weight, bias = matrix(rows, inputs), matrix(rows, outputs), matrix(outputs, inputs), matrix(outputs)
    strided = matrix(rows, outputs, 2)[..., 0]
    products = [(x, weight, bias, False, True), (x, weight, None, False, True), (dy, weight, None, False, False),
                (dy, x, None, True, False), (strided, weight, None, False, False), (strided, x, None, True, False)]
    before = torch.get_num_threads()
    for a, b, added, transpose_a, transpose_b in products:
        left, right = a.mT if transpose_a else a, b.mT if transpose_b else b
        exact = left.double() @ right.double() + (0 if added is None else added.double())
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.gemm(a, b, added, transpose_a, transpose_b))
        torch.set_num_threads(before)
        eager = left @ right if added is None else torch.addmm(added, left, right)
        assert_no_further("C", results[0], exact, exact.bfloat16() if dtype == torch.bfloat16 else eager)
        if HAS_BF16_GEMM if dtype == torch.bfloat16 else HAS_GEMM and not transpose_a:  # else it is PyTorch's
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(not HAS_GEMM, reason="gemm is built for CPUs with AVX-512; elsewhere it is PyTorch's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemm_refuses_what_does_not_fit(dtype):
    a = torch.randn(64, 128, dtype=dtype)
    for b, options, reason in ((a, (False, False), "do not fit"), (a.double(), (False, True), "is Double"),
                               (torch.randn(63, 128, dtype=dtype), (False, True), "multiple of 64"),
                               (torch.randn(64, 64, dtype=dtype), (True, True), "neither a transposed b")):
        with pytest.raises((RuntimeError, TypeError), match=reason):
            ops.gemm(a, b, None, *options)


@pytest.mark.skipif(not HAS_GEMM, reason="gemm is built for CPUs with AVX-512; elsewhere it is PyTorch's")
def test_which_products_in_fp32_are_gemms():
    weight = torch.randn(128, 64)
    least = 48 if torch.ops.bertfast.gemm_takes_few_rows() else 256
    assert suits(torch.randn(least, 64), weight) and not suits(torch.randn(least - 1, 64), weight)
    assert not suits(torch.randn(256, 96), torch.randn(128, 96))
    assert not suits(torch.randn(256, 64).double(), weight.double())


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_layers_have_the_gradients_of_pytorchs(n, frozen):
    torch.manual_seed(n)
    layers = [torch.nn.Linear(64, 128).bfloat16().requires_grad_(not frozen) for _ in range(n)]
    x = torch.randn(40, 64).bfloat16().requires_grad_()
    given = torch.randn(40, n * 128).bfloat16()
    assert suits(x, layers[0].weight) == (HAS_BF16_GEMM and not torch.cpu._is_amx_tile_supported())

    def both_ways(cast, ours):
        used = [copy.deepcopy(layer).to(cast) for layer in layers]
        start = x.detach().to(cast).requires_grad_()
        plain = lambda: torch.cat([layer(start) for layer in used], 1)
        y = plain() if not ours else joined_linear(start, *used) if n > 1 else sum(linear(start, used[0]))
        y.backward(given.to(cast))
        return [y, start.grad, *(p.grad for layer in used for p in layer.parameters())]

    found, plain = (both_ways(torch.bfloat16, ours) for ours in (True, False))
    exact = both_ways(torch.float64, False)
    assert frozen == all(g is None for g in found[2:])
    for i, result in enumerate(found):
        if result is not None:
            assert_no_further(f"result {i}", result, exact[i], plain[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_linear_layer_of_gelu_keeps_its_input_alone(dtype):
    """Its gradients are those of the two ops, of PyTorch's in fp64, and with nothing to train it is the two ops."""
    torch.manual_seed(0)
    x, layer = torch.randn(40, 128).to(dtype), torch.nn.Linear(128, 64).to(dtype)
    bias, given, kept = torch.randn(128).to(dtype), torch.randn(40, 64).to(dtype), []

    def results(call, cast=dtype):
        start, module = [t.detach().to(cast).requires_grad_() for t in (x, bias)], copy.deepcopy(layer).to(cast)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = call(*start, module)
        y.backward(given.to(cast))
        return [y, *(t.grad for t in start), module.weight.grad]

    ours = results(lambda x, bias, module: linear(x, module, bias)[0])
    assert sorted(kept) == [(40, 128), (64, 128), (128,)]
    two = results(lambda x, bias, module: linear(ops.bias_gelu(x, bias), module)[0])
    plain = lambda x, bias, module: F.linear(F.gelu(x + bias), module.weight)
    exact, eager = results(plain, torch.float64), results(plain)
    for i, result in enumerate(ours):
        assert torch.equal(result, two[i])
        assert_no_further(f"result {i}", result, exact[i], eager[i])
    kept.clear()
    layer.requires_grad_(False)
    assert torch.equal(linear(x, layer, bias)[0], ours[0]) and not kept


def opcheck_samples():
    """Arguments for every op of the dispatcher."""
    torch.manual_seed(0)
    seed, key = torch.tensor([SEED]), torch.arange(6)
    x, r, dy = (torch.randn(6, 16) for _ in range(3))
    w, b, lb = (torch.randn(16) for _ in range(3))
    mean, rstd = torch.randn(6), torch.rand(6) + 0.5
    drop = (0.1, seed, key, STREAM)
    yield "few_rows_linear", (torch.randn(3, 32), [torch.randn(4, 32), torch.randn(4, 32)], [torch.randn(4)] * 2)
    matrices = [torch.randn(6, 64).bfloat16() for _ in range(2)] + [torch.randn(64, 64).bfloat16()]
    yield "gemm", (matrices[0], matrices[2], torch.randn(64).bfloat16(), False, True)
    yield "gemm", (matrices[0], matrices[2], None, False, False)
    yield "gemm", (matrices[0], matrices[1], None, True, False)
    yield "gemm", (matrices[0].float(), matrices[2].float(), None, False, True)
    yield "dropout", (x, *drop)
    yield "bias_gelu_fwd", (x, b)
    yield "bias_gelu_bwd", (dy, x, b)
    yield "add_layer_norm_fwd", (x, b, r, w, lb, 1e-12, *drop)
    yield "add_layer_norm_fwd", (x, None, r, w, lb, 1e-12, 0.0, None, None, 0)
    yield "add_layer_norm_bwd", (dy, x, mean, rstd, w, *drop)
    yield "add_layer_norm_bwd", (dy, x, mean, rstd, w, 0.0, None, None, 0)
    yield "gelu_layer_norm_fwd", (x, b, w, lb, 1e-12)
    yield "gelu_layer_norm_bwd", (dy, x, b, w, mean, rstd)
    ids = torch.tensor([1, 0, 3, 3, 2, 1])
    tables = torch.randn(5, 16), torch.randn(6, 16), torch.randn(4, 16)
    yield "embedding_sum_fwd", (ids, key, ids, *tables, w, b, 1e-12, 0, *drop)
    yield "embedding_sum_bwd", (dy, ids, key, ids, *tables, w, mean, rstd, 0, *drop)
    q, k, v = torch.randn(6, 3, 2, 8).unbind(1)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    layout = (cu, cu, 3, 3, 0.3, 2, torch.tensor([1, 2], dtype=torch.int32), *drop[:3], STREAM)
    yield "attention_fwd", (q, k, v, *layout)
    out, lse = torch.ops.bertfast.attention_fwd(q, k, v, *layout)
    for name in ("attention_bwd", "attention_packed_bwd"):
        yield name, (torch.randn(6, 2, 8), q, k, v, out, lse, *layout)
    labels = torch.tensor([1, -100, 0, 4, -100, 2])
    yield "masked_vocab_projection_eval", (x, tables[0], torch.randn(5), labels)
    yield "masked_vocab_projection_fwd", (x, tables[0], torch.randn(5), labels, torch.tensor(0.25))
    scalars = (torch.tensor(1e-3), torch.tensor(3.0), torch.tensor(0.5), torch.tensor(0.0), 0.9, 0.99, 1e-6, 0.01)
    state = ([x.clone()], [dy], [], [r.clone()], [r.abs()])
    yield "adamw_step", (*state, *scalars)
    yield "lamb_step", (*state, *scalars)
    yield "grad_norm", ([x, w],)
    # the ops that put their large gradient into a buffer of the caller's
    into = torch.randn(5, 16)
    yield "embedding_sum_bwd_into", (dy, ids, key, ids, *tables, w, mean, rstd, 0, *drop, into)
    for add in (False, True):
        projected = (x, tables[0], torch.randn(5), labels, torch.tensor(0.25), into, add)
        yield "masked_vocab_projection_fwd_into", projected


@needs_extension
@pytest.mark.parametrize("laid_out", [False, True], ids=["apart", "adjacent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autograd_nodes_in_cpp_and_in_python(dtype, laid_out, monkeypatch):
    """A small BERT with dropout, some of it frozen: the same loss and gradients, bit for bit."""
    assert set(_define._nodes) == set(_define.NODES)
    config = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=128, max_position_embeddings=16)  # fmt: skip
    ids = torch.arange(40).view(4, 10) + 3
    found = []
    for nodes in (_define._nodes, {}):
        monkeypatch.setattr(_define, "_nodes", nodes)
        torch.manual_seed(0)
        model = BertForPreTraining(config).to(dtype).train()
        frozen = model.bert.encoder["layer"][0]
        frozen.attention["self"].requires_grad_(False)
        frozen.attention["output"].dense.bias.requires_grad_(False)
        if laid_out:
            Optimizer(model, dtype)
        loss = model(ids, labels=ids, next_sentence_label=ids[:, 0] % 2, seed=torch.tensor([7])).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for in_cpp, in_python in zip(*found):
        assert (in_cpp is None) == (in_python is None)
        assert in_cpp is None or torch.equal(in_cpp, in_python)


@pytest.mark.parametrize("nodes", ["as loaded", "in Python"])
def test_layers_of_one_row_apart_are_no_neighbours_to_read_on(nodes, monkeypatch):
    """A matrix of one row is contiguous whatever its stride, and the next one may begin where it ends."""
    if nodes == "in Python":
        monkeypatch.setattr(_define, "_nodes", {})
    layers, weight, bias = [torch.nn.Linear(64, 1) for _ in range(3)], torch.randn(9, 64), torch.randn(9)
    for i, layer in enumerate(layers):
        layer.weight, layer.bias = (torch.nn.Parameter(t[i : i + 7 : 3][:1]) for t in (weight, bias))
    x = torch.randn(5, 64)
    torch.testing.assert_close(joined_linear(x, *layers), torch.cat([layer(x) for layer in layers], 1))


@needs_extension
def test_a_linear_node_without_weights_is_refused():
    with pytest.raises(RuntimeError, match="there are no weights"):
        torch.ops.bertfast.linear(torch.zeros(3, 32), [], [], False)


@pytest.mark.parametrize("nodes", ["as loaded", "in Python"])
@pytest.mark.parametrize("name", [*CASES, "joined_linear", "gelu_linear"])
def test_a_second_derivative_is_refused(name, nodes, monkeypatch):
    """Also where the incoming gradient is a constant, as a loss's is: a penalty would be left out in silence."""
    if nodes == "in Python":
        monkeypatch.setattr(_define, "_nodes", {})
    if name in CASES:
        case = CASES[name]
        tensors = case.inputs(case.shapes[0], torch.float32)
        x = tensors[case.differentiable[0]].requires_grad_()
        y = case.fused(tensors, 0.1 if case.dropout else 0.0)
    else:
        x, module = torch.randn(8, 64, requires_grad=True), torch.nn.Linear(64, 32)
        y = joined_linear(x, module) if name == "joined_linear" else linear(x, module, torch.zeros(64))[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_opcheck_covers_every_op():
    checked = set()
    for name, args in opcheck_samples():
        torch.library.opcheck(getattr(torch.ops.bertfast, name).default, args)
        checked.add(name)
    assert checked == set(ops.backends())


def test_rows_and_statistics_may_have_any_stride():
    is_row = lambda a: isinstance(a, torch.Tensor) and a.dim() == 1 and a.is_floating_point()
    spread = lambda a: torch.stack([a, -a], 1)[:, 0] if is_row(a) else a
    for name, args in opcheck_samples():
        op = getattr(torch.ops.bertfast, name)
        for dense, spread_out in zip(*map(pytree.tree_leaves, (op(*args), op(*map(spread, args))))):
            torch.testing.assert_close(spread_out, dense, msg=name)


def philox_python(seed, counters):
    """Philox-4x32-7 on Python integers, from the paper's definition."""
    c, k = list(counters), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_dropout_is_as_defined():
    seed, p, stream, heads, columns = SEED, 0.3, 11, 3, 150
    row_key = torch.tensor([5 | 2 << 32, (1 << 31) + 7 | 9 << 32, 0])
    mask = keep_mask(p, torch.tensor(seed), row_key, columns, stream, heads)
    for head in (0, 2):
        for row, key in enumerate(row_key.tolist()):
            for column in (0, 15, 16, 63, 64, 149):
                counters = (16 * (column // 64) + column % 16, key & 0xFFFFFFFF, key >> 32, stream << 8 | head)
                word = philox_python(seed, counters)[column % 64 // 16]
                assert mask[head, row, column] == (word >= threshold(p))
    many = keep_mask(0.1, torch.tensor(seed), torch.arange(2000), 512, 1)
    assert abs(many.float().mean().item() - 0.9) < 4 * math.sqrt(0.09 / many.numel())
    assert keep_scale(0.1) == pytest.approx(1 / 0.9, rel=1e-9)
    words = philox(torch.tensor(-1), *(torch.tensor([0xFFFFFFFF]) for _ in range(4)))
    assert [int(w) for w in words] == philox_python(2**64 - 1, [0xFFFFFFFF] * 4)


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_impossible_dropout_is_refused(bad):
    with pytest.raises(ValueError, match="dropout probability"):
        threshold(bad)


def test_dropout_without_a_seed_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="seed"):
        ops.add_layer_norm(x, None, x, x[0], x[0], p=0.1)


def test_attention_refuses_unknown_masks():
    qkv, cu = torch.randn(3, 3, 1, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="mask_mode"):
        ops.attention_packed(qkv, cu, 3, mask_mode="upside-down")
    with pytest.raises(ValueError, match="prefix_lens"):
        ops.attention_packed(qkv, cu, 3, mask_mode="prefix")


def test_nothing_masked_gives_zero():
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((4, 8), (10, 8), (10,)))
    loss, n_masked, n_correct = ops.masked_vocab_projection(hidden, weight, bias, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and n_masked == 0 and n_correct == 0
    assert not any(t.grad.any() for t in (hidden, weight, bias))


MASTERS = {
    "fp32": (torch.float32, None), "fp64": (torch.float64, None), "bf16": (torch.bfloat16, torch.float32),
    "bf16 and the rest of its bits": (torch.bfloat16, torch.int16),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:bertfast. torch.float64:UserWarning")
@pytest.mark.parametrize(("dtype", "kept"), MASTERS.values(), ids=MASTERS)
def test_adamw_equals_torch(dtype, kept):
    torch.manual_seed(1)
    shapes = [(7, 33), (5,), (256, 64), (1,)]
    values = [torch.randn(s) for s in shapes]
    params = [v.to(dtype) for v in values]
    masters = [torch.empty_like(v, dtype=kept) for v in values] if kept else []
    optimizer_step.set_values(params, masters, values)
    expected = [torch.nn.Parameter(v.clone()) for v in values]
    optimizer = torch.optim.AdamW(expected, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    m, v = ([torch.zeros(s) for s in shapes] for _ in range(2))
    scalar = lambda x: torch.tensor(float(x))
    for step in range(1, 4):
        grads = [torch.randn(s).to(dtype) for s in shapes]
        norm = ops.grad_norm(grads)
        torch.testing.assert_close(norm, torch.cat([g.double().flatten() for g in grads]).norm().float())
        for e, g in zip(expected, grads):
            e.grad = g.float() * 0.5
        optimizer.step()
        before = [t.clone() for t in (*params, *masters, *m, *v)]
        args = (scalar(1e-2), scalar(step), scalar(0.5))
        ops.adamw_step(params, grads, masters, m, v, *args, scalar(1), beta2=0.99, weight_decay=0.1)
        assert all(torch.equal(a, b) for a, b in zip(before, (*params, *masters, *m, *v))), "a skipped step moved"
        ops.adamw_step(params, grads, masters, m, v, *args, scalar(0), beta2=0.99, weight_decay=0.1)
    for e, value, p in zip(expected, optimizer_step.values(params, masters), params):
        torch.testing.assert_close(value.float(), e.detach(), rtol=2e-6, atol=1e-6)
        assert torch.equal(p, value.to(dtype))


def test_a_split_master_is_whole_again():
    value = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1.00390625, -1.00390625, 3e38, 1e-40, -1e-40])])
    param, rest = optimizer_step.split_master(value)
    assert torch.equal(optimizer_step.join_master(param, rest).view(torch.int32), value.view(torch.int32))
    assert torch.equal(param[:1000], value[:1000].bfloat16()) and param[1002] == 1.0078125  # a tie, away from zero


def test_lamb_of_split_masters():
    sides = []
    for _ in range(2):
        torch.manual_seed(3)
        shapes = (70, 65), (5,), (1,)
        params, masters = map(list, zip(*(optimizer_step.split_master(torch.randn(s)) for s in shapes)))
        sides.append([params, [torch.randn(s).bfloat16() for s in shapes], masters,
                      [torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes]])
    scalars = [torch.tensor(x) for x in (1e-2, 3.0, 0.5, 0.0)]
    ops.lamb_step(*sides[0], *scalars, weight_decay=0.1)
    optimizer_step._lamb_step(*sides[1], *scalars, 0.9, 0.999, 1e-6, 0.1)
    for got, wanted in zip(*(optimizer_step.values(side[0], side[2]) for side in sides)):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=1e-6)


def test_lamb_equals_its_definition():
    torch.manual_seed(2)
    p, g = torch.randn(8, 4), torch.randn(8, 4)
    m, v, expected = torch.zeros_like(p), torch.zeros_like(p), p.clone()
    one = torch.tensor(1.0)
    ops.lamb_step([p], [g], [], [m], [v], torch.tensor(0.1), one, one, torch.tensor(0.0), weight_decay=0.01)
    u = g / (g.abs() + 1e-6) + 0.01 * expected
    torch.testing.assert_close(p, expected - 0.1 * expected.norm() / u.norm() * u)


@pytest.mark.parametrize("given", [None, 1.0], ids=["mean", "scale given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_loss_of_the_projection_may_be_scaled(dtype, given):
    """In fp16 a mean's by 65,536, which is no fp16 number; before that its gradients would round to zero.

    The counts are powers of two, so that all labels' gradients do not round to one side.
    """
    torch.manual_seed(0)
    values = [t.to(dtype) for t in (torch.randn(1024, 8), torch.randn(3000, 8) * 0.02, torch.zeros(3000))]
    labels, by = torch.arange(1024), 65536.0 if dtype == torch.float16 and given is None else 1 / 3
    sides = [[t.clone().requires_grad_() for t in values], [t.double().requires_grad_() for t in values]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fp16 on CPUs is slow, and says so
        scale = None if given is None else torch.tensor(given)
        (ops.masked_vocab_projection(*sides[0], labels, scale)[0] * by).backward()
    (F.cross_entropy(F.linear(*sides[1]), labels, reduction="sum") * (given or 1 / 1024) * by).backward()
    for ours, truth in zip((t.grad.double() for t in sides[0]), (t.grad for t in sides[1])):
        assert (ours - truth).abs().max() <= 16 * torch.finfo(dtype).eps * truth.abs().max() and (ours != 0).all()
        factor = (ours * truth).sum() / (truth * truth).sum()  # rounding has no direction, a rounded factor has
        assert abs(factor - 1) <= max(torch.finfo(dtype).eps / 8, 2e-7)


@pytest.mark.filterwarnings("ignore:bertfast. torch.float16:UserWarning")
def test_a_mean_of_one_label_is_no_larger_in_fp16_than_fp16_holds():
    """Its gradient is the label's times hidden, which eager has finite."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.full((1, 8), 17.0), torch.randn(500, 8) * 0.02, torch.zeros(500)
    sides = [[t.to(dtype).requires_grad_() for t in (hidden, weight, bias)] for dtype in (torch.float16, torch.float64)]
    labels = torch.tensor([3])
    ops.masked_vocab_projection(*sides[0], labels)[0].backward()
    F.cross_entropy(F.linear(*sides[1]), labels).backward()
    for ours, truth in zip((t.grad for t in sides[0]), (t.grad for t in sides[1])):
        assert (ours - truth).abs().max() <= 2e-3 * truth.abs().max()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ops.attention_packed(torch.randn(4, 2, 2, 8), torch.tensor([0, 4], dtype=torch.int32), 4), "3"),
    (lambda: ops.attention_packed(torch.randn(4, 4, 2, 8), torch.tensor([0, 4], dtype=torch.int32), 4), "3"),
    (lambda: ops.masked_vocab_projection(torch.randn(2, 8), torch.randn(5, 8), torch.zeros(5), torch.zeros(2).long(),
                                         torch.ones((), requires_grad=True)), "gets no gradient"),
])
def test_what_would_be_computed_wrongly_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_extension
def test_empty_heads_and_vocabularies_are_refused():
    with pytest.raises(RuntimeError, match="head_dim"):
        ops.attention_packed(torch.randn(4, 3, 2, 0), torch.tensor([0, 4], dtype=torch.int32), 4, scale=1.0)
    with pytest.raises(RuntimeError, match="empty weight"):
        ops.masked_vocab_projection(torch.randn(2, 8), torch.randn(0, 8), torch.zeros(0), torch.full((2,), -100))


def test_a_cuda_library_that_does_not_load_is_told(monkeypatch, tmp_path):
    def unloadable(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", unloadable)
    monkeypatch.setattr(_define, "register_launchers", lambda key: None)
    monkeypatch.setattr(_define, "_built", lambda name: tmp_path / name)
    with pytest.warns(UserWarning, match="_C_cuda does not load .undefined symbol.; rebuild it .make clean"):
        assert _define._load_triton() == "Triton"


def test_an_old_build_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(_define, "_built", lambda name: tmp_path / name)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("it may abort"))
    (tmp_path / "_C_avx2").write_bytes(b"\x7fELF csrc:of another commit")
    monkeypatch.setattr(_define, "__file__", str(tmp_path / "bertfast/ops/_define.py"))  # an installed one has no csrc
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/gemm.cpp").write_text("")
    assert _define._load_extension() == "reference: _C_avx2 is an old build; rebuild it (make clean install)"


def test_importing_asks_no_gpu_and_each_is_judged_by_itself(monkeypatch):
    """What asks initialises CUDA, which no forked child could use then."""
    asked = []
    for name, value in (("is_available", True), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: asked.append(name) or value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(9, 0), (7, 5)][gpu.index])
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(_define, "register_launchers", lambda key: None)
    assert _define._load_triton() == "Triton" and not asked
    _define._judged.cache_clear()
    tensors = [Mock(torch.Tensor, is_cuda=True, device=torch.device("cuda", i), dtype=torch.float32) for i in (0, 1)]
    assert [_define._without_kernel((t,)) for t in tensors] == [None, tensors[1]]
    for name in ("bias_gelu_fwd", "embedding_sum_fwd"):
        assert "compute capability 8.0" in _define.implementation(name, "cuda", {"cuda": "Triton"})
    _define._warn_of_reference.cache_clear()
    with pytest.warns(UserWarning, match=r"torch.float32 on cuda runs the slow references, Triton uses tensor cores"):
        _define._warn_of_reference(torch.float32, tensors[1].device)
    _define._judged.cache_clear()


def test_where_pytorch_multiplies_no_reference_is_named(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    for name, who in (("gemm", "PyTorch"), ("few_rows_linear", "PyTorch"), ("bias_gelu_fwd", "reference")):
        assert _define.implementation(name, "cpu", {"cpu": "C++ (avx2)"}) == f"{who}: no C++ (avx2) kernel for this op"


@pytest.mark.filterwarnings("ignore:bertfast. torch.float16:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimiser_refuses_tensors_of_other_shapes(dtype):
    """Also where they would broadcast, and in the reference."""
    one = torch.tensor(1.0)
    for step in (ops.adamw_step, ops.lamb_step):
        for wrong in range(4):
            (grad,), *others = ([torch.zeros((4,) if i == wrong else (3, 4))] for i in range(4))
            with pytest.raises((RuntimeError, ValueError), match="shape"):
                step([torch.zeros(3, 4, dtype=dtype)], [grad.to(dtype)], *others, one, one, one, one)


def test_no_gradients_have_norm_zero():
    assert ops.grad_norm([]) == 0


def test_scores_of_any_size_have_a_softmax():
    qkv = torch.randn(50, 3, 2, 64, generator=torch.Generator().manual_seed(0)) * 1e5
    out = ops.attention_packed(qkv, torch.tensor([0, 50], dtype=torch.int32), 50)
    q, k, v = qkv.permute(1, 2, 0, 3).double()
    truth = ((q @ k.mT / 8).softmax(-1) @ v).permute(1, 0, 2)
    assert ((out - truth).abs().amax((1, 2)) <= 1e-4 * truth.abs().max()).sum() >= 48  # but for a tie or two


@needs_extension
@pytest.mark.parametrize("size", [1e2, 1e5, 1e18])
def test_scores_of_any_size_have_a_gradient(size):
    """A sequence of one is its own value; of two, the first wins by far."""
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(5, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        qkv[:, 0], qkv[:, 1] = size, torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0], dtype=dtype).view(5, 1, 1)
        dy = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        qkv.requires_grad_()
        ops.attention_packed(qkv, torch.tensor([0, 1, 3, 5], dtype=torch.int32), 2).backward(dy)
        dv = torch.zeros(5, 2, 64)
        for sequence in ([0], [1, 2], [3, 4]):
            dv[sequence[0]] = dy[sequence].float().sum(0)
        torch.testing.assert_close(qkv.grad[:, 2].float(), dv, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("op", ["bias_gelu", "gelu_layer_norm", "add_layer_norm"])
def test_outputs_are_contiguous_whatever_the_inputs_are(op):
    """torch.compile plans by the reference's strides, whichever implementation runs."""
    x, row = torch.randn(40, 32).t(), torch.ones(40)
    arguments = {"bias_gelu": (row,), "gelu_layer_norm": (row, row, row, 1e-12),
                 "add_layer_norm": (row, x, row, row, 1e-12)}[op]
    assert getattr(ops, op)(x, *arguments).is_contiguous()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert getattr(ops, op)(mode.from_tensor(x), *fakes).is_contiguous()


@pytest.mark.parametrize("change", ["adapter", "hook", "forward"])
def test_more_than_a_linear_layer_is_called(change):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    modules = [(Adapted if change == "adapter" else torch.nn.Linear)(16, 16) for _ in range(2)]
    for module in modules if change == "hook" else ():
        module.register_forward_hook(lambda module, args, out: out + 1)
    for module in modules if change == "forward" else ():
        module.forward = lambda x, own=module.forward: own(x) + 1
    x, bias = torch.randn(5, 16), torch.randn(16)
    plain = lambda x, m: F.linear(x, m.weight, m.bias) + 1
    torch.testing.assert_close(joined_linear(x, *modules), torch.cat([plain(x, m) for m in modules], -1))
    torch.testing.assert_close(sum(linear(x, modules[0])), plain(x, modules[0]))
    torch.testing.assert_close(sum(linear(x, modules[0], bias)), plain(F.gelu(x + bias), modules[0]))


@pytest.mark.parametrize("width", [64, 8192])
def test_rows_of_next_to_no_variance_are_numbers(width):
    """The variance about a mean that is itself rounded may come out below zero."""
    torch.manual_seed(0)
    base = (torch.rand(400, 1) * 6e5).expand(400, width).clone()
    base[:, 0] += torch.rand(400) * 0.1
    base[0], base[0, 0] = 362904.625, 362904.625 + 0.03125
    y = ops.add_layer_norm(base, None, torch.zeros_like(base), torch.ones(width), torch.zeros(width))
    assert y.isfinite().all()
    base[1, 3] = float("nan")
    y = ops.add_layer_norm(base, None, torch.zeros_like(base), torch.ones(width), torch.zeros(width))
    assert y[1].isnan().all() and y[0].isfinite().all()


def test_a_backward_hook_on_a_linear_layer_is_called():
    modules, called = [torch.nn.Linear(16, 16) for _ in range(3)], []
    for module in modules[1:]:
        module.register_full_backward_hook(lambda module, *gradients: called.append(module))
    x = torch.randn(5, 16, requires_grad=True)
    (joined_linear(x, *modules[:2]).sum() + linear(x, modules[2])[0].sum()).backward()
    assert set(called) == set(modules[1:])
