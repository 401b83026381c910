"""Our Triton kernels beside the field's, by what they compile to: `python benchmarks/aot.py --peers [FOLDER]`.

Same shapes and dtype (bf16, BERT-base: H=768, I=3072, V=30522, D=64), same compiler, same report. The peers are
Liger-Kernel and cut-cross-entropy where they are installed, flash-attention's Triton kernels and the Triton tutorial's
attention where FOLDER holds their files (layer_norm.py and cross_entropy.py of flash_attn/ops/triton,
flash_attn_triton.py, 06-fused-attention.py). Static cost, not speed:
  instructions  SASS instructions that are executed for an element, from the disassembly and the loops' trip counts;
                an element is one of a (T, H) tensor, a logit, or an attention score
  bytes         read and written for an element by formula, a tensor once a kernel (attention: an element of Q)
A peer that does less in its kernel is charged what the rest costs in kernels of its own, in bytes; `REMARKS` say so.
"""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from bertfast.benchmarks import aot, contest, report
from bertfast.kernels import add_layer_norm, attention, bias_gelu, masked_vocab_projection

H, I, V, D, HEADS = 768, 3072, 30522, 64, 12
ROWS = 64  # of the calls: only alignment and constants reach the compiler
ROWS_OF_PROGRAM = 16  # of a backward pass over rows
LOGIT_ROWS = 2048  # for the bytes of a product
SMALL_LOOP = 36  # instructions: tails, locks and barriers, counted once
OURS, LIGER, CCE = "bertfast", "Liger-Kernel", "cut-cross-entropy"
FLASH, TUTORIAL = "flash-attn Triton", "Triton tutorial"
OPERAND = 2 * H * (1 / V + 1 / LOGIT_ROWS)  # bytes a logit for reading hidden and weight once

REMARKS = {
    "LayerNorm forward": "Ours and flash-attn's add the residual and store the sum; Liger's is charged PyTorch's add. "
                         "A warp holds a row: less occupancy, but no barrier, and four times the bytes in flight.",
    "LayerNorm backward": "Ours sums dbias of the linear layer too, the others are charged that pass; it is what ours "
                          "has more in instructions and registers.",
    "GELU forward": "Ours is BERT's erf with the bias. Liger's nearest, GEGLU, is the tanh form times a gate: cheaper "
                    "by its tanh, and another function.",
    "GELU backward": "As above; ours sums dbias too.",
    "cross entropy": "Ours adds the decoder's bias, counts correct predictions and pads rows to 64, which buys 16-byte "
                     "accesses; the others are charged PyTorch's pass for the bias. That work is what ours has more "
                     "in instructions. Liger's fused linear cross entropy calls the same kernel, on chunks of rows.",
    "projection without logits": "Ours keeps a fixed order: it writes blocks of the gradient and multiplies them again "
                                 "(dweight by cuBLAS, not among the instructions). cut-cross-entropy adds under locks, "
                                 "in bf16 and in no fixed order; its bytes are those of no block filtered.",
    "attention forward S=512": "Ours takes packed sequences of any length, so that it masks every tile, the others "
                               "none of these. The tutorial's is fp16, and dense: lengths are multiples of its tiles.",
    "attention backward S=128": "One kernel reads everything once; with a single tile of scores what comes before and "
                                "after counts in full. Masks as in the forward.",
    "attention backward S=512": "Ours forms the scores twice, in two kernels, so that dq needs neither atomics nor "
                                "fp32 in memory and is the same every time; flash-attn's adds dq by atomics. The "
                                "tutorial's, in one kernel, fills the registers (and spills), which without masks and "
                                "with larger tiles takes fewer instructions.",
}  # fmt: skip


@dataclass
class Cost:
    """What one launch is charged: elements of a program, passes of its loops by address, and bytes an element."""

    elements: float
    trips: tuple[float, ...] = ()
    bytes: float = 0.0


def executed(instructions: int, loops: list, trips: tuple[float, ...]) -> float:
    """Instructions of one thread, given how often each loop (from, to) of more than SMALL_LOOP runs, by address."""
    times = [1.0] * instructions
    large = sorted(loop for loop in map(tuple, loops) if loop[1] - loop[0] > SMALL_LOOP)
    if len(large) != len(trips):
        raise ValueError(f"{len(trips)} loops were expected, found {large}")
    for (start, end), n in zip(large, trips):
        times[start:end] = [t * n for t in times[start:end]]
    return sum(times)


def tensors() -> SimpleNamespace:
    zeros = partial(torch.zeros, dtype=torch.bfloat16)
    return SimpleNamespace(
        x=zeros(ROWS, H), w=zeros(H), y=zeros(ROWS, I), b=zeros(I), row=torch.zeros(ROWS), one=torch.ones(()),
        table=zeros(V, H), bias=zeros(V), labels=torch.zeros(ROWS, dtype=torch.int64), logits=zeros(ROWS, V),
    )  # fmt: skip


def our_launches(t):
    """(operation, launch, {kernel: Cost from its constants}, bytes of what other kernels do)."""
    row = lambda passes: lambda k: Cost(H * k["ROWS"] * (passes or 1), (passes,) if passes else ())
    tile = lambda k: Cost(k["ROWS"] * k["COLUMNS"])
    gelu_rows = lambda k: Cost(k["ROWS"] * k["COLUMNS"] * ROWS_OF_PROGRAM, (ROWS_OF_PROGRAM,))
    passes = lambda k: -(-V // k["BLOCK"])
    yield "LayerNorm forward", partial(
        add_layer_norm.add_layer_norm_fwd, t.x, None, t.x, t.w, t.w, 1e-12, 0.0, None, None, 0
    ), {"add_layer_norm_fwd": row(0)}, 8
    yield "LayerNorm backward", partial(
        add_layer_norm.add_layer_norm_bwd, t.x, t.x, t.row, t.row, t.w, 0.0, None, None, 0
    ), {"add_layer_norm_bwd": row(ROWS_OF_PROGRAM)}, 6
    yield "GELU forward", partial(bias_gelu.bias_gelu_fwd, t.y, t.b), {"bias_gelu_fwd": tile}, 4
    yield "GELU backward", partial(bias_gelu.bias_gelu_bwd, t.y, t.y, t.b), {"bias_gelu_bwd": gelu_rows}, 6
    yield "cross entropy", partial(
        masked_vocab_projection.cross_entropy, t.x, t.table, t.bias, t.labels, t.one
    ), {"cross_entropy": lambda k: Cost(V, (passes(k), passes(k)))}, 6

    def without_logits():
        *_, lse = masked_vocab_projection.statistics(t.x, t.table, t.bias, t.labels)
        masked_vocab_projection.gradients_without_logits(
            t.x, t.table, t.bias, t.labels, t.one, lse, torch.empty_like(t.table), False
        )

    deep = lambda k: H / k["DEPTH"]
    yield "projection without logits", without_logits, {
        "statistics": lambda k: Cost(k["ROWS"] * k["COLUMNS"] * 4, (4, deep(k))),
        "gradient": lambda k: Cost(k["ROWS"] * k["COLUMNS"], (deep(k),)),
        "add_product": lambda k: Cost(k["ROWS"] * V / (H / k["COLUMNS"]), (V / k["DEPTH"],)),
        "column_sum": lambda k: Cost(k["ROWS"] * k["COLUMNS"] * ROWS_OF_PROGRAM, (ROWS_OF_PROGRAM,)),
    }, 8 + 4 * OPERAND  # fmt: skip
    for length in (128, 512):
        q, k, v = torch.zeros(512, 3, HEADS, D, dtype=torch.bfloat16).unbind(1)
        out, lse = torch.zeros(512, HEADS, D, dtype=torch.bfloat16), torch.zeros(HEADS, 512)
        bounds, key = torch.tensor([0, 512], dtype=torch.int32), torch.zeros(512, dtype=torch.int64)
        layout = bounds, bounds, length, length, D**-0.5, 0, None, 0.0, None, key, 0
        queries = lambda k, n=length: Cost(k["BLOCK_M"] * n, (n / k["BLOCK_N"],))
        keys = lambda k, n=length: Cost(k["BLOCK_N"] * n, (n / k["BLOCK_M"],))
        if length == 512:
            yield "attention forward S=512", partial(attention.attention_fwd, q, k, v, *layout), {
                "attention_fwd": queries
            }, 8
        yield f"attention backward S={length}", partial(
            attention.attention_packed_bwd, out, q, k, v, out, lse, *layout
        ), {"attention_bwd_dq": queries, "attention_bwd_dkdv": keys}, 16 if length == 128 else 24


def liger_launches(t):
    from liger_kernel.ops import cross_entropy, geglu, layer_norm

    logits = t.logits.clone().requires_grad_()
    loss = partial(cross_entropy.cross_entropy_forward, logits, t.labels, None, -100, 0.0, 0.0, "mean", None, False)
    # on a CPU the backward is one program over all rows
    yield "LayerNorm forward", partial(layer_norm.layer_norm_forward, t.x, t.w, t.w, 1e-12), {
        "_layer_norm_forward": lambda k: Cost(H)
    }, 4 + 6  # fmt: skip
    yield "LayerNorm backward", partial(layer_norm.layer_norm_backward, t.x, t.x, t.w, t.w, t.row, t.row), {
        "_layer_norm_backward": lambda k: Cost(H * ROWS_OF_PROGRAM, (ROWS_OF_PROGRAM,))
    }, 6 + 2  # fmt: skip
    yield "GELU forward", partial(geglu.geglu_forward, t.y, t.y), {"_geglu_tanh_forward": lambda k: Cost(I)}, 6
    yield "GELU backward", partial(geglu.geglu_backward, t.y, t.y, t.y), {
        "_geglu_tanh_backward": lambda k: Cost(I)
    }, 10  # fmt: skip
    yield "cross entropy", loss, {"liger_cross_entropy": lambda k: Cost(V, (0, 1, 1))}, 6 + 4


def cce_launches(t):
    from cut_cross_entropy import cce_backward, cce_lse_forward, indexed_dot

    hidden, table = t.x.requires_grad_(), t.table.clone().requires_grad_()

    def both():
        cce_lse_forward.cce_lse_forward_kernel(t.x.detach(), t.table)
        indexed_dot.indexed_neg_dot_forward_kernel(t.x.detach(), t.table, t.labels)
        cce_backward.cce_backward_kernel(t.one, hidden, table, t.row, None, None, 2.0**-12, t.labels)

    tile = lambda k: k["BLOCK_B"] * k["BLOCK_V"]
    yield "projection without logits", both, {
        "_cce_lse_forward": lambda k: Cost(tile(k), (H / k["BLOCK_D"],)),
        "_indexed_neg_dot_forward": lambda k: Cost(k["BLOCK_B"] * V / (H / k["BLOCK_D"])),
        "_cce_backward": lambda k: Cost(tile(k), (H / k["BLOCK_D"], H / (2 * k["BLOCK_D"]), H / (2 * k["BLOCK_D"]))),
    }, 2 * OPERAND + 2 * 2 * 2 * H / 128  # tiles of 128 x 128: their rows of dhidden and dweight, read and written


def flash_launches(t, folder: Path):
    """Launched as their own launchers do, which need a GPU; of the autotuned numbers of warps, those of ours."""
    normed = dict(IS_RMS_NORM=False, BLOCK_N=1024, HAS_BIAS=True, HAS_DROPOUT=False, HAS_ROWSCALE=False, HAS_B1=False)
    norm = load(folder / "layer_norm.py")
    of_sum = dict(HAS_RESIDUAL=True, STORE_RESIDUAL_OUT=True, STORE_DROPOUT_MASK=False, HAS_X1=False, HAS_W1=False)
    of_gradient = dict.fromkeys(("HAS_DRESIDUAL", "STORE_DRESIDUAL", "HAS_DY1", "HAS_DX1", "RECOMPUTE_OUTPUT"), False)
    yield "LayerNorm forward", lambda: norm._layer_norm_fwd_1pass_kernel.fn[(ROWS,)](
        t.x, t.x, t.w, t.w, t.x, *[None] * 4, t.x, *[None] * 4, t.row, t.row, H, H, H, H, 0, 0, ROWS, H, 1e-12, 0.0, 0,
        **normed, **of_sum, num_warps=1,
    ), {"_layer_norm_fwd_1pass": lambda k: Cost(H)}, 8  # fmt: skip
    yield "LayerNorm backward", lambda: norm._layer_norm_bwd_kernel.fn[(8,)](
        t.x, t.w, t.w, None, t.x, t.x, t.row, t.row, *[None] * 9, t.row, t.row, H, 0, H, H, 0, 0, 0, 0, ROWS, H, 1e-12,
        0.0, 0, ROWS_OF_PROGRAM, **normed, **of_gradient, num_warps=2,
    ), {"_layer_norm_bwd": lambda k: Cost(H * ROWS_OF_PROGRAM, (ROWS_OF_PROGRAM,))}, 6 + 2  # fmt: skip
    entropy = load(folder / "cross_entropy.py")
    numbers = 0.0, 1.0, 0.0, -100, V, 0, V, V

    def losses():
        entropy.cross_entropy_fwd_kernel[(ROWS,)](
            t.row, t.row, t.row, t.logits, t.labels, *numbers, BLOCK_SIZE=16384, SPLIT=False, PRECOMPUTED_LSE=False,
            num_warps=16,
        )  # fmt: skip
        entropy.cross_entropy_bwd_kernel[(ROWS, 8)](
            t.logits, t.row, t.logits, t.row, t.labels, *numbers, V, 1, BLOCK_SIZE=4096, num_warps=8
        )

    yield "cross entropy", losses, {
        "cross_entropy_fwd": lambda k: Cost(V, (-(-V // k["BLOCK_SIZE"]),)),
        "cross_entropy_bwd": lambda k: Cost(V / -(-V // k["BLOCK_SIZE"])),
    }, 6 + 4  # fmt: skip
    flash = load(folder / "flash_attn_triton.py")
    for n in (128, 512):
        q, lse = torch.zeros(1, n, HEADS, D, dtype=torch.bfloat16), torch.zeros(1, HEADS, n)
        s = q.stride(0), q.stride(2), q.stride(1)
        sizes = HEADS, n, n, n, D, n // 32, n // 32, "none", False, D
        tile = dict(BLOCK_M=128, BLOCK_N=128, num_stages=1)
        if n == 512:
            yield "attention forward S=512", lambda q=q, lse=lse, s=s, sizes=sizes, tile=tile: flash._fwd_kernel[
                (4, HEADS)
            ](q, q, q, None, q, lse, lse, D**-0.5, *s, *s, *s, 0, 0, 0, *s, *sizes, num_warps=4, **tile), {
                "_fwd": lambda k: Cost(128 * 512, (4,))
            }, 8  # fmt: skip

        def backward(q=q, lse=lse, s=s, sizes=sizes, tile=tile):
            flash._bwd_preprocess_do_o_dot[(4, HEADS)](
                q, q, lse, *s, *s, HEADS, sizes[1], sizes[1], D, BLOCK_M=128, BLOCK_HEADDIM=D
            )
            flash._bwd_kernel.fn[(4, HEADS)](
                q, q, q, None, q, q.float(), q, q, lse, lse, D**-0.5, *s, *s, *s, 0, 0, 0, *s, *s, *s, *s, *sizes,
                SEQUENCE_PARALLEL=True, num_warps=8, **tile,
            )  # fmt: skip

        # delta; then q, k, v, dout, dk, dv, and dq in fp32: zeroed, added to by each block of keys, cast
        yield f"attention backward S={n}", backward, {
            "_bwd_preprocess_do_o_dot": lambda k, n=n: Cost(128 * n),
            "_bwd": lambda k, n=n: Cost(128 * n, (n / 128,)),
        }, 4 + 12 + 4 + 8 * n / 128 + 6  # fmt: skip


def tutorial_launches(folder: Path):
    """In fp16, which its kernels cast to; without warp specialisation, its first choice of tile for pytest."""
    tutorial = load(folder / "06-fused-attention.py")
    for n in (128, 512):
        q, row = torch.zeros(1, HEADS, n, D, dtype=torch.float16), torch.zeros(1, HEADS, n)
        if n == 512:
            yield "attention forward S=512", lambda q=q, row=row: tutorial._attn_fwd.fn[(4, HEADS)](
                D**-0.5, row, 1, HEADS, q, q, q, q, 512, HEAD_DIM=D, BLOCK_M=128, BLOCK_N=64, FP8_OUTPUT=False, STAGE=1,
                warp_specialize=False, IS_HOPPER=False, num_warps=4, num_stages=2,
            ), {"_attn_fwd": lambda k: Cost(128 * 512, (512 / 64,))}, 8  # fmt: skip

        def backward(n=n, q=q, row=row):
            tutorial._attn_bwd_preprocess[(n // 128, HEADS)](q, q, row, 1, HEADS, n, BLOCK_M=128, HEAD_DIM=D)
            tutorial._attn_bwd[(n // 128, 1, HEADS)](
                q, q, q, D**-0.5, q, q, q, q, row, row, *q.stride(), HEADS, n, BLOCK_M1=32, BLOCK_N1=128, BLOCK_M2=128,
                BLOCK_N2=32, BLK_SLICE_FACTOR=2, HEAD_DIM=D, CAUSAL=False, num_warps=4, num_stages=5,
            )  # fmt: skip

        # delta; k scaled by an op of its own; q, k, v, dout, and dq, dk, dv
        yield f"attention backward S={n}", backward, {
            "_attn_bwd_preprocess": lambda k, n=n: Cost(128 * n),
            "_attn_bwd": lambda k, n=n: Cost(128 * n, (n / 32, n / 32)),
        }, 4 + 4 + 8 + 6  # fmt: skip


def load(path: Path) -> ModuleType:
    """A file without the package around it: what it imports from flash-attention's does nothing here."""
    for name in ("flash_attn", "flash_attn.utils", "flash_attn.utils.torch", "flash_attn.utils.library"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["flash_attn.utils.torch"].__dict__.update(custom_fwd=lambda f: f, custom_bwd=lambda f: f)
    sys.modules["flash_attn.utils.library"].__dict__.update(triton_op=lambda *_, **__: lambda f: f)
    torch.cuda.current_device, torch.cuda.get_device_properties = lambda: 0, lambda _: SimpleNamespace(warp_size=32)
    torch.cuda.get_device_capability = lambda: (8, 0)  # of the tutorial's list of tiles to try
    text = path.read_text()  # one file has options of tl.dot that Triton no longer has
    text = re.sub(r"tl\.dot\((\w+), (\w+), trans_b=True\)", r"tl.dot(\1, tl.trans(\2))", text)
    text = re.sub(r"tl\.dot\((.*), (\w+), trans_a=True\)", r"tl.dot(tl.trans(\1), \2)", text)
    spelled = aot.CACHE.parent / "peers" / path.name  # Triton reads kernels from their file
    spelled.parent.mkdir(parents=True, exist_ok=True)
    spelled.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, spelled)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contenders(folder: Path | None):
    t = tensors()
    yield OURS, our_launches(t)
    if importlib.util.find_spec("liger_kernel"):
        yield LIGER, liger_launches(t)
    if importlib.util.find_spec("cut_cross_entropy"):
        yield CCE, cce_launches(t)
    if folder:
        yield FLASH, flash_launches(t, folder)
        yield TUTORIAL, tutorial_launches(folder)


def report_architecture(arch: int, folder: Path | None) -> list[dict]:
    """A row an operation and contender: its kernels' resources, and what they execute and move for an element."""
    compiled, rows = aot.compile_only(arch), []
    for who, launches in contenders(folder):
        for operation, launch, costs, moved in launches:
            compiled.clear()
            launch()
            row = {"key": f"{operation}, sm_{arch}", "contender": who, "failed": "", "bytes": moved, "kernels": [],
                   "instructions": 0.0}  # fmt: skip
            for name, kwargs, kernel in compiled:
                found = aot.report(arch, name, "", "bf16", kwargs, kernel, {})
                if found["kernel"] not in costs:  # second stages over short tensors
                    continue
                cost = costs[found["kernel"]](kwargs)
                per_thread = executed(found["instructions"], found["loops"], cost.trips)
                row["instructions"] += per_thread * 32 * found["warps"] / cost.elements
                row["kernels"].append({n: found[n] for n in ("kernel", "registers", "spill", "shared", "warps",
                                                             "occupancy", "load128", "narrow")})  # fmt: skip
            rows.append(row)
    return rows


def run(archs: list[int], reports) -> dict:
    """The result of all architectures, sorted so that who is compared stands together."""
    rows = sorted((row for rows in reports for row in rows), key=lambda r: list(REMARKS).index(r["key"].split(", ")[0]))
    rows.sort(key=lambda r: archs.index(int(r["key"].rpartition("_")[2])))
    result = {"suite": "aot_peers", **contest.provenance(1), "remarks": REMARKS, "rows": rows}
    result["versions"]["triton"] = aot.triton.__version__
    report.show(result)
    return result
