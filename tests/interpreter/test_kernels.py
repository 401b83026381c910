"""Every Triton kernel with every option, through its op, against fp64 truth: no further from it than eager PyTorch."""

import math
from unittest.mock import Mock

import pytest
import torch
from bertfast.benchmarks.cases import CASES, run
from bertfast.kernels import hardware, rows
from bertfast.kernels import masked_vocab_projection as projection_kernels
from bertfast.kernels import optimizer_step as optimizer_kernels

from bertfast import ops
from bertfast.ops import optimizer_step as optimizer_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Even, odd rows, odd columns, one row, zero rows; beyond one tile of rows or columns; rows too wide for all column sums
# in registers; each a fraction of a second.
SHAPES = {
    "rows": ((8, 256), (37, 128), (5, 203), (1, 64), (0, 64), (3, 1100), (2, 4100)),
    "masked_vocab_projection": ((40, 64, 1000), (37, 48, 203), (1, 64, 333), (0, 64, 64), (3, 16, 4200)),
    "attention": (
        ((64, 64), 0, 1, 64), ((37, 1, 0, 90), 5, 2, 32), ((9,), 0, 1, 40), ((), 4, 2, 64), ((20, 7), 3, 2, 24)
    ),  # fmt: skip
}
WITH_LAUNCHERS = [c for c in CASES.values() if c.name != "embedding_sum"]


def shapes_of(case):
    kind = "attention" if case.name.startswith("attention") else case.name
    return SHAPES.get(kind, SHAPES["rows"])


def table():
    """fp32 sees every shape with and without dropout; the sixteen-bit types the two largest shapes of each op."""
    for case in WITH_LAUNCHERS:
        for index, shape in enumerate(shapes_of(case)):
            for p in (0.0, 0.3) if case.dropout else (0.0,):
                for name, dtype in DTYPES.items():
                    core = (name == "fp32" and (p > 0 or not case.dropout)) or (name == "bf16" and index == 1 and p > 0)
                    marks = () if core or index == 1 and not case.dropout else pytest.mark.full
                    yield pytest.param(case, shape, p, dtype, id=f"{case.name}-{index}-p{p}-{name}", marks=marks)


def assert_no_further(name, fused, eager, truth, noise=0.0):
    """The parity contract's rule; two units in the last place of the largest value for the differing last rounding."""
    assert fused.shape == truth.shape and fused.dtype == eager.dtype and torch.isfinite(fused).all(), name
    if truth.numel() == 0:
        return
    error, allowed = ((side.double() - truth).abs().max().item() for side in (fused, eager))
    ulps = max(2.0, math.sqrt(truth.numel())) if fused.dtype == torch.float32 else 2.0
    tiny = ulps * torch.finfo(fused.dtype).eps * truth.abs().max().item() + 1e-30
    assert error <= allowed + tiny + noise, f"{name}: error {error:.3g}, eager {allowed:.3g} + {tiny:.3g}"


def check(case, shape, p, dtype):
    truth = run(case.eager, case, case.inputs(shape, torch.float64), p)
    eager = run(case.eager, case, case.inputs(shape, dtype), p)
    for name, value in run(case.fused, case, case.inputs(shape, dtype), p).items():
        is_loss = name == "y" and "hidden" in case.differentiable
        noise = loss_noise(case.inputs(shape, torch.float64), dtype) if is_loss else 0.0
        assert_no_further(name, value, eager[name], truth[name], noise)


def loss_noise(t, dtype):
    """Both sides hold logits in sixteen bits, so that the mean loss of n rows is a sum of n independent roundings: on
    which side they happen to cancel is luck. Their standard deviation bounds it, eps / 2 / sqrt(3) of a logit each."""
    if dtype == torch.float32 or not t["hidden"].numel():
        return 0.0
    logits = t["hidden"] @ t["weight"].T + t["bias"]
    n = max(1, int((t["labels"] != -100).sum()))
    return torch.finfo(dtype).eps / 2 / 3**0.5 * logits.abs().max().item() / n**0.5


@pytest.mark.parametrize(("case", "shape", "p", "dtype"), list(table()))
def test_error_not_above_eager(case, shape, p, dtype):
    check(case, shape, p, dtype)


OTHER_TILES = [  # op, shape, what `bertfast bench tune` might have measured
    ("add_layer_norm", (37, 128), {"add_layer_norm_fwd H128": 8, "add_layer_norm_bwd H128": 64}),
    ("gelu_layer_norm", (37, 128), {"gelu_layer_norm_fwd H128": 64, "gelu_layer_norm_bwd H128": 8}),
    ("bias_gelu", (37, 128), {"bias_gelu_fwd I128": [1, 2], "bias_gelu_bwd I128": [8, 8]}),
    ("masked_vocab_projection", (37, 48, 203), {"cross_entropy": [64, 8]}),
    ("masked_vocab_projection", (37, 48, 203), {"projection H48": [64, 64, 32, 4, 2]}),
    ("attention_full", ((37, 1, 0, 90), 5, 2, 32), {
        "attention fwd D32 dropout mask 0": [32, 64, 8, 1], "attention bwd_whole D32 dropout mask 0": None,
        "attention bwd_dq D32 dropout mask 0": [128, 64, 8, 2], "attention bwd_dkdv D32 dropout mask 0": [32, 64, 8, 1],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "measured"), OTHER_TILES, ids=[row[0] for row in OTHER_TILES])
def test_measured_tiles_are_taken_and_as_exact(name, shape, measured, monkeypatch):
    tiles = Mock(get=Mock(side_effect=measured.get))
    monkeypatch.setattr(hardware, "tuned_tiles", lambda: tiles)
    if "projection H48" in measured:
        monkeypatch.setattr(projection_kernels, "LOGITS_LIMIT", 0)
    check(CASES[name], shape, 0.3, torch.bfloat16)
    assert {call.args[0] for call in tiles.get.call_args_list} >= set(measured)


def test_epsilon_counts():
    """An eps far above the table's 1e-12, and rows without variance."""
    x, w = torch.zeros(3, 70), torch.ones(70)
    x[1, :35] = 1.0
    expected = torch.nn.functional.layer_norm(x, (70,), w, w, 0.5)
    torch.testing.assert_close(ops.add_layer_norm(x, None, torch.zeros_like(x), w, w, 0.5), expected)
    expected = torch.nn.functional.layer_norm(torch.nn.functional.gelu(x), (70,), w, w, 0.5)
    torch.testing.assert_close(ops.gelu_layer_norm(x, torch.zeros(70), w, w, 0.5), expected)


def test_second_stage_of_a_sum():
    """More partial sums than one block holds, columns that do not fill one."""
    partial = torch.randn(3, 130, 45)
    for got, want in zip(rows.sum_partials(partial, torch.float32), partial.sum(1)):
        torch.testing.assert_close(got, want)


def test_counts_of_the_projection(way):
    """The first of equal largest logits is the prediction, as torch.argmax has it, be they in one tile of columns, in
    several or in several programs' shares; -100 counts nowhere; the last row's largest is in another block."""
    weight, hidden = torch.zeros(4200, 16), torch.ones(5, 16)
    weight[[2, 9, 70, 4100]], weight[4190], hidden[4] = 1.0, -1.0, -1.0
    labels = torch.tensor([2, 9, -100, 5, 4190])
    args = hidden, weight, torch.zeros(4200), labels
    for got, want in zip(ops.masked_vocab_projection(*args)[1:], (4, 2)):
        assert got == want
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(ops.masked_vocab_projection(*args)[0], loss)


@pytest.mark.parametrize("label", [-1, 20, 10**6])
def test_a_label_outside_the_vocabulary_has_no_finite_loss(label, way):
    hidden, weight = torch.ones(2, 16), torch.ones(20, 16)
    assert not torch.isfinite(ops.masked_vocab_projection(hidden, weight, torch.ones(20), torch.tensor([3, label]))[0])


@pytest.fixture(params=[None, 0], ids=["logits", "no_logits"])
def way(request, monkeypatch):
    """Both ways of the projection; without logits, one block of columns after another."""
    if request.param is not None:
        monkeypatch.setattr(projection_kernels, "LOGITS_LIMIT", request.param)
        monkeypatch.setattr(projection_kernels, "BLOCK_BYTES", 1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{name}", marks=() if shape[0] == 37 else pytest.mark.full)
        for shape in ((37, 48, 203), (130, 64, 300), (1, 64, 64)) for name, dtype in DTYPES.items()
    ],
)  # fmt: skip
def test_projection_without_logits(shape, dtype, monkeypatch):
    """No further from the truth than eager, in one block of columns and in several."""
    monkeypatch.setattr(projection_kernels, "LOGITS_LIMIT", 0)
    check(CASES["masked_vocab_projection"], shape, 0.0, dtype)
    monkeypatch.setattr(projection_kernels, "BLOCK_BYTES", 1)
    check(CASES["masked_vocab_projection"], shape, 0.0, dtype)


@pytest.mark.parametrize("programs", [4, 528], ids=["tile_by_tile", "a_program_a_tile"])
def test_a_projection_on_many_words_without_logits(programs, monkeypatch):
    """Its total is summed tile by tile, then over programs, and must not lose what each adds to it: gradients as good
    as from logits."""
    monkeypatch.setattr(projection_kernels, "backward_programs", lambda device: programs)
    case, shape = CASES["masked_vocab_projection"], (70, 100, 4099)
    truth = run(case.eager, case, case.inputs(shape, torch.float64), 0.0)
    found = []
    for limit in (projection_kernels.LOGITS_LIMIT, 0):
        monkeypatch.setattr(projection_kernels, "LOGITS_LIMIT", limit)
        found.append(run(case.fused, case, case.inputs(shape, torch.float32), 0.0))
    for name in ("dhidden", "dweight", "dbias"):
        with_logits, without = ((out[name].double() - truth[name]).abs().max() for out in found)
        assert without <= with_logits


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sink", [torch.bfloat16, torch.float32])
def test_gradient_into_a_sink(sink, accumulate, way):
    case = CASES["masked_vocab_projection"]
    t = case.inputs((12, 32, 100), torch.bfloat16)
    arguments = t["hidden"], t["weight"], t["bias"], t["labels"], torch.tensor(0.25)
    alone = torch.ops.bertfast.masked_vocab_projection_fwd(*arguments)
    buffer = torch.ones(100, 32, dtype=sink)
    into = torch.ops.bertfast.masked_vocab_projection_fwd_into(*arguments, buffer, accumulate)
    assert all(torch.equal(a, b) for a, b in zip((*alone[:4], alone[5]), into))
    torch.testing.assert_close(buffer, (alone[4] + accumulate).to(sink), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sink", [torch.float32, torch.bfloat16])
def test_projection_under_autocast(sink, way):
    """Its products stay in the dtype that its inputs have."""
    t = CASES["masked_vocab_projection"].inputs((12, 32, 100), torch.float32)
    arguments = t["hidden"], t["weight"], t["bias"], t["labels"], torch.tensor(0.25)
    buffers = torch.zeros(2, 100, 32, dtype=sink)
    alone = torch.ops.bertfast.masked_vocab_projection_fwd_into(*arguments, buffers[0], False)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.ops.bertfast.masked_vocab_projection_fwd_into(*arguments, buffers[1], False)
    assert all(torch.equal(a, b) for a, b in zip((*alone, buffers[0]), (*under, buffers[1])))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_optimizer_step_and_grad_norm(kind, dtype):
    """Against the reference in the same dtypes: several chunks, a tail, an empty, a one-element and a zero tensor."""
    shapes = [(130, 65), (7,), (0,), (1,), (8192,), (3,)]
    kernels, references = [], []
    for side in (kernels, references):
        torch.manual_seed(3)
        masters = [torch.randn(s) for s in shapes]
        masters[-1].zero_()  # LAMB's trust ratio is 1 there
        side += [[m.to(dtype) for m in masters], [torch.randn(s).to(dtype) for s in shapes]]
        side += [[] if dtype == torch.float32 else masters]
        if dtype == torch.bfloat16:  # the masters' halves
            side[0], side[2] = map(list, zip(*map(optimizer_reference.split_master, masters)))
        side += [[torch.randn(s) for s in shapes], [torch.rand(s) for s in shapes]]
    norm = optimizer_kernels.grad_norm(kernels[1])
    torch.testing.assert_close(norm, torch.cat([g.double().flatten() for g in kernels[1]]).norm().float())
    for step, skip in ((1.0, 0.0), (2.0, 1.0), (3.0, 0.0)):
        scalars = [torch.tensor(x) for x in (1e-2, step, 0.5, skip)]
        for side, where in ((kernels, optimizer_kernels), (references, optimizer_reference)):
            call = getattr(where, f"{kind}_step" if where is optimizer_kernels else f"_{kind}_step")
            call(*side, *scalars, 0.9, 0.999, 1e-6, 0.1)
        compared = ([*s[:2], optimizer_reference.values(s[0], s[2]), *s[3:]] for s in (kernels, references))
        for ours, theirs in zip(*compared):
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, rtol=2e-6 if a.dtype == torch.float32 else 1e-2, atol=1e-6)
    for param, master in zip(kernels[0], optimizer_reference.values(kernels[0], kernels[2])):
        assert torch.equal(param, master.to(dtype))


@pytest.mark.parametrize(("param", "state", "message"), [
    ((4,), [(5,), None, (4,), (4,)], "shapes"),
    ((4,), [(4,), None, (4,), (3,)], "shapes"),
    ((4,), [(4,), (1, 4), (4,), (4,)], "shapes"),
    ((4,), [(4,), None, (4,), (4, torch.bfloat16)], "moments and masters must be float32"),
    ((4, torch.bfloat16), [(4,), None, (4,), (4,)], "parameters without masters"),
    ((4,), [(4,), (4, torch.int16), (4,), (4,)], "masters of bfloat16 may be int16"),
    ((4, torch.bfloat16), [(4,), (4, torch.bfloat16), (4,), (4,)], "masters must be float32"),
])  # fmt: skip
def test_a_step_on_tensors_that_do_not_fit_is_refused(param, state, message):
    def made(given):
        dtype = given[-1] if isinstance(given[-1], torch.dtype) else torch.float32
        return [torch.ones([n for n in given if n is not dtype], dtype=dtype)]

    lists = [[] if given is None else made(given) for given in (param, *state)]
    with pytest.raises(ValueError, match=message):
        optimizer_kernels.adamw_step(*lists, *[torch.ones(())] * 4, 0.9, 0.999, 1e-6, 0.01)


@pytest.mark.parametrize("case", WITH_LAUNCHERS, ids=lambda case: case.name)
def test_rows_of_any_stride(case):
    """Biases, labels and row keys that are columns of something wider."""
    shape = shapes_of(case)[1]
    dense = case.inputs(shape, torch.float32)
    strided = {name: torch.stack([t, t], 1)[:, 0] if t.dim() == 1 and len(t) > 1 else t for name, t in dense.items()}
    p = 0.3 if case.dropout else 0.0
    wanted, got = (run(case.fused, case, tensors, p) for tensors in (dense, strided))
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def short(t):
    """Without its last column, or element."""
    return t[..., :-1].contiguous()


MISFITS = {
    "add_layer_norm": {"bias": short, "residual": short, "weight": short, "ln_bias": short,
                       "row_key": torch.Tensor.int},
    "bias_gelu": {"bias": short},
    "gelu_layer_norm": {"bias": short, "weight": short, "ln_bias": short},
    "dropout": {"row_key": short, "x": torch.Tensor.flatten},
    "masked_vocab_projection": {"weight": short, "bias": short, "labels": short},
    "attention_prefix": {"prefix_lens": short, "row_key": short},
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in MISFITS.items() for name in names])
def test_what_a_kernel_would_read_past_its_end_is_refused(op, name):
    case = CASES[op]
    tensors = case.inputs(shapes_of(case)[1], torch.float32)
    tensors[name] = MISFITS[op][name](tensors[name])
    with pytest.raises(ValueError, match=f"{name} (has shape|must be)"):
        case.fused(tensors, 0.3 if case.dropout else 0.0)


@pytest.mark.parametrize("name", ["k", "v", "cu_seqlens_k"])
def test_keys_that_do_not_fit_the_queries_are_refused(name):
    q, bounds = torch.randn(9, 2, 16), torch.tensor([0, 4, 9], dtype=torch.int32)
    tensors = {"q": q, "k": q, "v": q, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    tensors[name] = tensors[name][:, :1] if name == "k" else tensors[name][:-1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        ops.attention(**tensors, max_q=5, max_k=5)


@pytest.mark.parametrize("seed", [None, torch.tensor([5], dtype=torch.int32), torch.zeros(0, dtype=torch.int64)],
                         ids=["none", "int32", "empty"])  # fmt: skip
def test_dropout_without_a_seed_is_refused(seed):
    x, bounds = torch.randn(4, 64), torch.tensor([0, 4], dtype=torch.int32)
    for call in (
        lambda: ops.dropout(x, 0.1, seed), lambda: ops.add_layer_norm(x, None, x, x[0], x[0], p=0.1, seed=seed),
        lambda: ops.attention(x[:, None], x[:, None], x[:, None], bounds, bounds, 4, 4, p=0.1, seed=seed),
    ):
        with pytest.raises(ValueError, match="needs a seed"):
            call()


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_optimizer_step_without_momentum_on_a_transposed_gradient(kind):
    sides = [], []
    for side in sides:
        torch.manual_seed(3)
        side += [[torch.randn(5, 7)], [torch.randn(7, 5).t()], [], [torch.randn(5, 7)], [torch.rand(5, 7)]]
    steps = getattr(optimizer_kernels, f"{kind}_step"), getattr(optimizer_reference, f"_{kind}_step")
    for step, lists in zip(steps, sides):
        step(*lists, *[torch.tensor(x) for x in (1e-2, 2.0, 0.5, 0.0)], 0.0, 0.999, 1e-6, 0.1)
    for ours, theirs in zip(*sides):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_optimizer_tensors_off_16_bytes_are_not_read_16_at_a_time():
    buffer = torch.zeros(8)
    aligned = [optimizer_kernels.table([t])[3]["ALIGNED"] for t in (buffer, buffer[4:], buffer[1:5])]
    assert aligned == [True, True, False]


def test_statistics_are_those_of_the_stored_sum():
    x, w = torch.randn(5, 64).bfloat16(), torch.ones(64).bfloat16()
    _, z, mean, rstd = torch.ops.bertfast.add_layer_norm_fwd(x, None, x.flip(0), w, w, 1e-12, 0.0, None, None, 0)
    torch.testing.assert_close(mean, z.float().mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd, z.float().var(1, correction=0).rsqrt(), rtol=1e-6, atol=0.0)
