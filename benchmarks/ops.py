"""Every fused op against plain PyTorch at its best, eager and compiled, forward and backward apart.

Inputs come from the table of the tests (cases.py). Before it is timed, every contender's output and gradients are
compared with the table's definition in fp32: ours with the same dropout mask, the others (which draw their own) with
dropout off. Contenders take turns within a row. Memory-bound rows are a share of a copy of as many bytes, measured in
the same turns (so small shapes are compared with a copy in cache), the others of the GEMM rate in their dtype.
On a GPU, events time each direction, with the L2 cache flushed before the forward, and Liger-Kernel and flash-attn are
contenders where they are installed. (cut-cross-entropy has no bias, so it computes something else.)
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from bertfast.benchmarks import contest, plain, roofline
from bertfast.benchmarks.cases import CASES, Case
from torch import Tensor

from bertfast import machine, ops
from bertfast.config import BertConfig
from bertfast.model import BertForPreTraining
from bertfast.optim import Optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREES = {"fp32": 2e-5, "bf16": 1.5e-2}  # relative in the 2-norm
UPDATE_AGREES = 1e-3  # the same, of an optimiser's first update: a hundredth of the weights, whose rounding it has
TORCH_AGREES = {"fp32": 2e-5, "bf16": 0.15}  # torch sums the gradients of weights in bf16: 3 % off at 512 rows
TURN = 0.03  # seconds a contender runs in one turn


def _norm(x: Tensor, t: dict, bias: str = "ln_bias") -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t["weight"], t[bias], 1e-12)


def _embedding(t: dict, p: float) -> Tensor:
    tables = ((t["input_ids"], t["word"]), (t["position_ids"], t["position"]), (t["token_type_ids"], t["token_type"]))
    (a, word), (b, position), (c, kind) = tables
    return F.dropout(_norm(F.embedding(a, word, 0) + F.embedding(b, position) + F.embedding(c, kind), t, "bias"), p)


def _attention(t: dict, p: float) -> Tensor:
    """Equally long sequences as (B, N, S, D)."""
    total, _, heads, dim = t["qkv"].shape
    n = len(t["cu_seqlens"]) - 1
    q, k, v = t["qkv"].view(n, total // n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    return plain.attention(q, k, v, p).transpose(1, 2).reshape(total, heads, dim)


def _projection(t: dict, p: float) -> Tensor:
    """The cross entropy in fp32, as autocast has it."""
    return F.cross_entropy(F.linear(t["hidden"], t["weight"], t["bias"]).float(), t["labels"])


BEST: dict[str, Callable] = {  # plain PyTorch, drawing its own dropout
    "add_layer_norm": lambda t, p: _norm(F.dropout(t["x"] + t["bias"], p) + t["residual"], t),
    "bias_gelu": lambda t, p: F.gelu(t["x"] + t["bias"]),
    "gelu_layer_norm": lambda t, p: _norm(F.gelu(t["x"] + t["bias"]), t),
    "embedding_sum": _embedding,
    "attention_full": _attention,
    "masked_vocab_projection": _projection,
}

def peers(op: str) -> dict[str, Callable]:
    """What others offer for an op on a GPU, of those that are installed."""
    found: dict[str, Callable] = {}
    if find_spec("liger_kernel") and op in ("add_layer_norm", "masked_vocab_projection"):
        from liger_kernel.transformers import functional as liger

        found["Liger-Kernel"] = {
            "add_layer_norm": lambda t, p: liger.liger_layer_norm(
                F.dropout(t["x"] + t["bias"], p) + t["residual"], t["weight"], t["ln_bias"], 1e-12),
            "masked_vocab_projection": lambda t, p: liger.liger_fused_linear_cross_entropy(
                t["hidden"], t["weight"], t["labels"], t["bias"]),
        }[op]
    if find_spec("flash_attn") and op == "attention_full":
        from flash_attn import flash_attn_varlen_qkvpacked_func as flash

        found["flash-attn"] = lambda t, p: flash(
            t["qkv"], t["cu_seqlens"], int(t["cu_seqlens"].diff().max()), dropout_p=p)
    return found


V = 30522
TABLES: dict[str, dict[str, list[tuple]]] = {  # shapes by op, for the quick form and the whole table
    "quick": {
        **{op: [(16, 256), (2048, 256), (2048, 1024)] for op in ("add_layer_norm", "bias_gelu", "gelu_layer_norm")},
        "embedding_sum": [(2048, 256, V)],
        "attention_full": [((128,) * 16, 0, 4, 64), ((512,) * 4, 0, 4, 64)],
        "masked_vocab_projection": [(307, 256, V)],
    },
    "whole": {
        **{op: [(T, H) for T in (16, 512, 2048, 16384) for H in (128, 256, 512, 768, 1024)]
           for op in ("add_layer_norm", "bias_gelu", "gelu_layer_norm")},
        "embedding_sum": [(T, H, V) for T in (16, 512, 2048, 16384) for H in (256, 768)],
        "attention_full": [((S,) * (T // S), 0, N, 64) for S, T in ((128, 2048), (512, 2048), (512, 8192))
                           for N in (4, 12)],
        "masked_vocab_projection": [(R, H, V) for R in (154, 307, 1229) for H in (256, 512, 768)],
    },
}


@dataclass
class Side:
    """One contender of a row: `call(tensors, p)`, whose leaves are `leaves`, the tensors' copies of its own."""

    call: Callable
    tensors: dict[str, Tensor]
    leaves: list[Tensor]

    def forward_and_backward(self, p: float) -> tuple[Tensor, tuple[Tensor, ...], float, float]:
        """Output, gradients, and the seconds that each direction took."""
        device = self.leaves[0].device
        if device.type == "cuda":
            flush(device)
        began = _now(device)
        y = self.call(self.tensors, p)
        between = _now(device)
        gradients = torch.autograd.grad(y, self.leaves, self.tensors["dy"].to(y.dtype))
        ended = _now(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return y.detach(), gradients, _seconds(began, between), _seconds(between, ended)


def _now(device: torch.device):
    """This moment: on a GPU an event in its stream, which is passed when the work queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(began, ended) -> float:
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3


@functools.cache
def _larger_than_l2(device: torch.device) -> Tensor:
    return torch.empty(512 << 20, dtype=torch.uint8, device=device)


def flush(device: torch.device) -> None:
    """Empty a GPU's L2, and keep it busy (some 2 ms) while the launches of what is timed are queued behind."""
    for _ in range(16):
        _larger_than_l2(device).zero_()


def side(call: Callable, case: Case, tensors: dict[str, Tensor]) -> Side:
    own = {n: t.detach().clone().requires_grad_(n in case.differentiable) for n, t in tensors.items()}
    return Side(call, own, [own[n] for n in case.differentiable])


def difference(found: Side, truth: Side, p: float, names: tuple[str, ...]) -> tuple[float, str]:
    """The largest relative difference (2-norm) of output and gradients, and whose it is."""
    y, gradients, *_ = found.forward_and_backward(p)
    wanted, wanted_gradients, *_ = truth.forward_and_backward(p)
    pairs = zip(("y", *names), (y, *gradients), (wanted, *wanted_gradients))
    errors = [(_relative(a, b), name) for name, a, b in pairs]
    return max(errors)


def _relative(a: Tensor, b: Tensor) -> float:
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20)).item()
    return error if error == error else float("inf")  # a NaN compares as smaller than everything


def prepare(op: str, shape: tuple, dtype: str) -> tuple[dict[str, Tensor], Side]:
    """The tensors of an op and shape on the device, and the op's definition on them in fp32."""
    case, device = CASES[op], machine.choose_device()
    tensors = case.inputs(shape, DTYPES[dtype])
    if op == "masked_vocab_projection":
        tensors["labels"] = tensors["labels"].clamp(min=0)  # all slots used
        tensors["hidden"] = tensors["hidden"] / 12  # no peaked rows: subnormal gradients are slow for everyone
    tensors = {n: t.to(device) for n, t in tensors.items()}
    exact = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    return tensors, side(case.eager, case, exact)


def refusal(name: str, found: Side, truth: Side, case: Case, dtype: str) -> str:
    """Why a contender is refused: whose difference from the definition is too large; "" if none is."""
    ours = name == "bertfast"
    error, where = difference(found, truth, 0.1 if ours and case.dropout else 0.0, case.differentiable)
    allowed = (AGREES if ours else TORCH_AGREES)[dtype]
    return f"refused: {where} differs from the definition by {error:.2g} (allowed {allowed})" if error > allowed else ""


def measure(op: str, shape: tuple, dtype: str, calls: dict[str, Callable], rounds: int) -> list[dict]:
    """Rows of one op and shape, one a contender and direction: {"median": seconds a call, "share": of the peak, …}."""
    case, device = CASES[op], machine.choose_device()
    p = 0.1 if case.dropout else 0.0
    tensors, truth = prepare(op, shape, dtype)
    costs = roofline.COSTS[op](shape, DTYPES[dtype].itemsize)
    key = f"{op} {shape_name(shape)} {dtype}"
    sides, failed = {}, {}
    for name, call in calls.items():
        sides[name] = side(call, case, tensors)
        try:
            if refused := refusal(name, sides[name], truth, case, dtype):
                failed[name] = refused
            for _ in range(3):
                sides[name].forward_and_backward(p)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    del truth
    ready = {n: s for n, s in sides.items() if n not in failed}
    seconds: dict[tuple[str, int], list[float]] = {(n, d): [] for n in ready for d in (0, 1)}
    copies = [_Copy(cost.bytes, device) for cost in costs]
    compute = costs[0].flops > 0
    peak = 0.0
    for turn in range(rounds + 1):  # the first is the warm-up: the pages that all of them together need are fresh ones
        for name, contender in ready.items():
            totals, n, began = [0.0, 0.0], 0, time.perf_counter()
            while n < 1 or time.perf_counter() - began < TURN:
                *_, forward, backward = contender.forward_and_backward(p)
                totals, n = [totals[0] + forward, totals[1] + backward], n + 1
            for d in (0, 1) if turn else ():
                seconds[name, d].append(totals[d] / n)
        if compute:
            peak = max(peak, machine.gemm_rate(DTYPES[dtype], device))
        for moved in copies if not compute else []:
            moved.turn()
    rows: list[dict[str, Any]] = []
    whole = op == "masked_vocab_projection"  # our forward forms the gradients: only both together compare
    for name in calls:
        for d, direction in enumerate(["both"] if whole else ["forward", "backward"]):
            row = {"key": f"{key} {direction}", "op": op, "shape": shape_name(shape), "dtype": dtype,
                   "direction": direction, "contender": name, "failed": failed.get(name, "")}
            if name in ready:
                samples = seconds[name, d]
                if whole:
                    samples = [a + b for a, b in zip(samples, seconds[name, 1])]
                row |= {"samples": samples, **contest.middle(samples), "flops": costs[d].flops, "bytes": costs[d].bytes,
                        "peak": peak if compute else copies[d].rate}
                row["rate"] = (costs[d].flops if compute else costs[d].bytes) / row["median"]
                row["share"] = row["rate"] / row["peak"]
            rows.append(row)
    return rows


class _Copy:
    """A copy that moves `n_bytes` in all, read and written: what a memory-bound op is compared with."""

    def __init__(self, n_bytes: float, device: torch.device):
        self.n_bytes = max(int(n_bytes) // 8, 1) * 8
        self.source = torch.ones(self.n_bytes // 8, device=device)
        self.target = torch.empty_like(self.source)
        self.rate = 0.0

    def turn(self) -> None:
        device = self.source.device
        on_gpu = device.type == "cuda"  # there timed as the ops are: by events, from an empty L2
        for _ in range(3 if on_gpu else max(3, min(200, int(2e7 / self.n_bytes)))):
            if on_gpu:
                flush(device)
            began = _now(device)
            self.target.copy_(self.source)
            ended = _now(device)
            if on_gpu:
                torch.cuda.synchronize()
            self.rate = max(self.rate, self.n_bytes / _seconds(began, ended))


def shape_name(shape: tuple) -> str:
    """2048x256; for attention sequences x length x heads x head dimension."""
    if isinstance(shape[0], tuple):
        lengths, _, heads, dim = shape
        return f"{len(lengths)}x{lengths[0]}x{heads}x{dim}"
    return "x".join(map(str, shape))


def dtypes() -> list[str]:
    """Those that are worth measuring: bf16 only where its products are no fallback."""
    return [name for name in DTYPES if name == "fp32" or machine.multiplies_bf16(machine.choose_device())]


def run(*, quick: bool, only: list[str], rounds: int, threads: int) -> dict:
    """The whole table, or its quick form, or some ops of it: the result as JSON's types."""
    machine.keep_pages()
    torch.set_num_threads(threads)
    rows: list[dict] = []
    stopped = False
    chosen = dtypes()
    for name in DTYPES.keys() - chosen:
        contest.tell(f"{name} {contest.NO_BF16}")
    table = TABLES["quick" if quick else "whole"]
    try:
        for op in only or table:
            for dtype in chosen if op in table else []:
                calls = {"bertfast": CASES[op].fused, "eager": BEST[op]}
                if machine.choose_device().type == "cuda":
                    calls |= peers(op)
                if not quick:  # one function for all shapes, as a user has it: the second makes it a dynamic one
                    torch._dynamo.reset()
                    calls["compiled"] = torch.compile(BEST[op])
                for shape in table[op]:
                    rows += measure(op, shape, dtype, calls, rounds)
                    contest.tell(rows[-1]["key"].rpartition(" ")[0])
        for preset in ["mini"] if quick else ["mini", "base"]:
            for dtype in chosen if not only or "adamw_step" in only else []:
                rows += optimizer_rows(preset, dtype, rounds)
    except KeyboardInterrupt:
        stopped = True
    settings = {"quick": quick, "rounds": rounds, "dropout": 0.1}
    return {"suite": "ops", **contest.provenance(threads), "settings": settings, "backends": ops.backends(),
            "stopped_early": stopped, "rows": rows}


def optimizer_rows(preset: str, dtype: str, rounds: int) -> list[dict]:
    """Norm, clipping and AdamW over all tensors of a preset, against torch's fused AdamW (on fp32 masters for bf16)."""
    device = machine.choose_device()
    torch.manual_seed(0)
    models = [BertForPreTraining(BertConfig.preset(preset)).to(device, DTYPES[dtype]).float()]  # the same start in bf16
    models.append(copy.deepcopy(models[0]).to(DTYPES[dtype]))
    gradients = [torch.randn_like(p).to(DTYPES[dtype]) for p in models[0].parameters()]
    options = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
    ours = Optimizer(models[0], DTYPES[dtype], max_grad_norm=1.0, **options)
    theirs = list(models[1].parameters())
    eager = plain.AdamW(theirs, lr=1e-4, **options)
    cost = roofline.Cost(0, sum(p.numel() for p in theirs) * DTYPES[dtype].itemsize)  # the norm reads the gradients
    cost.bytes += roofline.optimizer_cost(sum(p.numel() for p in theirs), DTYPES[dtype].itemsize).bytes
    steps = {"bertfast": (lambda: ours.step(1e-4), list(models[0].parameters())),
             "eager": (lambda: eager.step(1.0), theirs)}
    names = [name for name, _ in models[0].named_parameters()]
    masters = {"bertfast": lambda: [ours.master_state()[name] for name in names], "eager": lambda: eager.masters}
    flat = lambda name: torch.cat([t.detach().float().flatten() for t in masters[name]()])
    moved, seconds, updates = _Copy(cost.bytes, device), {name: [] for name in steps}, {}
    for turn in range(rounds + 1):
        for name, (step, parameters) in steps.items():
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.clone()
            before = flat(name) if not turn else None
            took, _ = contest.timed(step, device)
            if turn:
                seconds[name].append(took)
            else:  # the first step is the check and the warm-up
                updates[name] = flat(name) - before
        moved.turn()
    error = _relative(updates["bertfast"], updates["eager"])
    rows = []
    for name, samples in seconds.items():
        row = {"key": f"adamw_step {preset} {dtype} both", "op": "adamw_step", "shape": preset, "dtype": dtype,
               "direction": "both", "contender": name, "failed": "", "samples": samples, **contest.middle(samples),
               "flops": 0, "bytes": cost.bytes, "peak": moved.rate}
        row["rate"] = cost.bytes / row["median"]
        row["share"] = row["rate"] / row["peak"]
        if name == "bertfast" and error > UPDATE_AGREES:
            row = {**{k: row[k] for k in ("key", "op", "shape", "dtype", "direction", "contender")},
                   "failed": f"refused: the update differs from torch's by {error:.2g} (allowed {UPDATE_AGREES})"}
        rows.append(row)
    return rows
