"""What the Triton kernels compile to, without a GPU: `python benchmarks/aot.py [--full] [--arch 80,90] [--only WORD]`.

The real launchers are called with CPU tensors while a stub stands in for the CUDA driver: every kernel is compiled with
the arguments, alignments and configuration that a training step gives it, and never launched. The cubin is then taken
apart with the tools that Triton brings, and held against the rules:
  bf16 and fp16   no spills, tensor-core instructions of the generation in every matrix kernel, 128-bit global access
  all             shared memory within the limit of a block
  attention       bf16 and fp16: dropout takes at most one resident block (but of D=16, where up to six are resident),
                  and on sm_80 and sm_90 adds at most 14 instructions a score to the loop, in the forward at every head
                  size and mask, in the backward up to D=64 without a mask (beyond, registers are short without it)
The CUDA C++ of csrc/cuda is compiled as well, where there is an nvcc: no spills, 128-bit loads in the wide variants.
fp32 is a correctness path and gfx942 is compiled only. A broken rule ends with exit code 1. Occupancy is computed from
registers, shared and tensor memory; nothing here is a measurement of speed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what a GPU run has today; 3.10 will change the default
os.environ.setdefault("BERTFAST_NO_EXT", "1")

import torch
import triton
from bertfast.kernels import (
    add_layer_norm,
    attention,
    bias_gelu,
    dropout,
    gelu_layer_norm,
    hardware,
    masked_vocab_projection,
    optimizer_step,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bertfast import BertConfig, BertForPreTraining, PackedBatch
from bertfast.ops import linear
from bertfast.ops._define import register_launchers
from bertfast.optim import Optimizer

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "aot.json"  # disassembly by the hash of the cubin
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#          threads and blocks of an SM, KiB of shared memory of an SM and of a block, tensor-core instruction
HARDWARE = {
    80: (2048, 32, 164, 163, r"\bHMMA\."),
    86: (1536, 16, 100, 99, r"\bHMMA\."),
    89: (1536, 24, 100, 99, r"\bHMMA\."),
    90: (2048, 32, 228, 227, r"\bHGMMA\."),
    100: (2048, 32, 228, 227, r"\bUTC\w*MMA"),
    120: (1536, 24, 100, 99, r"\bHMMA\."),
}
COUNTS = {
    "mma": r"\b(?:HMMA|HGMMA)\.|\bUTC\w*MMA",
    "load128": r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128|\bUTMALDG",
    "store128": r"\bSTG\.E\.(?:\w+\.)*128|\bUTMASTG",
    "narrow": r"\b(?:LDG|STG)\.E\.(?:\w+\.)*(?:U16|U8|S16)\b",
    "local": r"\b(?:LDL|STL)\b",
}
SMALL = "sum_partials", "norm", "trust_ratio", "combine"  # second stages, not worth wide accesses
MATRIX = "attention", "statistics", "gradient", "add_product"
COLUMNS = ("kernel", "case", "arch", "warps", "registers", "spill", "shared", "blocks", "occupancy", "instructions",
           "loop", "per_element", *COUNTS, "dropout", "blocks_lost")  # fmt: skip


class StubDriver:
    """Stands where the CUDA driver would, for one architecture: enough for Triton to compile and no more."""

    def __init__(self, arch: int | str):
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_only(arch: int | str) -> list:
    """Make every launch of this process compile for `arch` instead; returns the list the kernels are put on."""
    compiled = []
    triton.runtime.driver.set_active(StubDriver(arch))
    hardware.tuned_tiles = lambda: {}  # what is shipped, not what was measured on this machine
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kwargs, kernel))
        return kernel

    JITFunction.run = compile_instead
    return compiled


def row_cases(dtype, h, dropouts):
    x, w = torch.zeros(64, h, dtype=dtype), torch.zeros(h, dtype=dtype)
    statistic, seed, key = torch.zeros(64), torch.zeros(1, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for p in dropouts:
        drop = p, seed, key, 3
        yield f"H{h} p{p}", partial(add_layer_norm.add_layer_norm_fwd, x, w, x, w, w, 1e-12, *drop)
        yield f"H{h} p{p}", partial(add_layer_norm.add_layer_norm_bwd, x, x, statistic, statistic, w, *drop)
    yield f"H{h}", partial(gelu_layer_norm.gelu_layer_norm_fwd, x, w, w, w, 1e-12)
    yield f"H{h}", partial(gelu_layer_norm.gelu_layer_norm_bwd, x, x, w, w, statistic, statistic)


def attention_cases(dtype, d, dropouts, masks=(0,)):
    n, s = 2, 128
    qkv, out = torch.zeros(s, 3, n, d, dtype=dtype), torch.zeros(s, n, d, dtype=dtype)
    lse, seed, key = torch.zeros(n, s), torch.zeros(1, dtype=torch.int64), torch.zeros(s, dtype=torch.int64)
    cu, prefix = torch.tensor([0, s], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    q, k, v = qkv.unbind(1)
    for p in dropouts:
        for mask in masks:
            for longest in (128, 512):  # the one kernel of short sequences, the two of long ones
                layout = cu, cu, longest, longest, d**-0.5, mask, prefix, p, seed, key, 3
                name = f"D{d} S{longest} p{p}" + ("", " causal", " prefix")[mask]
                yield name, partial(attention.attention_fwd, q, k, v, *layout)
                yield name, partial(attention.attention_packed_bwd, out, q, k, v, out, lse, *layout)


def other_cases(dtype):
    x, w = torch.zeros(64, 3072, dtype=dtype), torch.zeros(3072, dtype=dtype)
    seed, key = (torch.zeros(n, dtype=torch.int64) for n in (1, 64))
    yield "H3072", partial(dropout.dropout, x, 0.1, seed, key, 3)
    yield "I3072", partial(bias_gelu.bias_gelu_fwd, x, w)
    yield "I3072", partial(bias_gelu.bias_gelu_bwd, x, x, w)
    hidden, table, bias = (torch.zeros(s, dtype=dtype) for s in ((16, 64), (30522, 64), (30522,)))
    labels, one = torch.zeros(16, dtype=torch.int64), torch.ones(())
    yield "V30522", partial(masked_vocab_projection.masked_vocab_projection_fwd, hidden, table, bias, labels, one)
    yield "V30522 no logits", partial(without_logits, hidden, table, bias, labels, one)
    p, state = [torch.zeros(4096, dtype=dtype)], [torch.zeros(4096)]
    masters = {torch.float32: [], torch.float16: state, torch.bfloat16: [torch.zeros(4096, dtype=torch.int16)]}[dtype]
    scalars = one, one, one, one, 0.9, 0.999, 1e-6, 0.01
    yield "adamw", partial(optimizer_step.adamw_step, p, p, masters, state, state, *scalars)
    yield "lamb", partial(optimizer_step.lamb_step, p, p, masters, state, state, *scalars)
    yield "", partial(optimizer_step.grad_norm, p)


def training_step(preset: str, length: int, kind: str) -> None:
    """A whole step in bf16 through the launchers, with the arguments of a GPU's: forward, backward and optimiser.

    Two layers stand for all: one computes every row and one the read rows, and the others launch the same again.
    """
    n, picks = 1024 // length, 1024 * 15 // 100
    model = BertForPreTraining(BertConfig.preset(preset, num_hidden_layers=2)).train()
    optimizer = Optimizer(model, torch.bfloat16, kind=kind, sink=True)
    rows, per_sequence, per_pick, read = (torch.zeros(k, dtype=torch.int64) for k in (1024, n, picks, picks + n))
    bounds = torch.zeros(n + 1, dtype=torch.int32)
    batch = PackedBatch(rows, rows, rows, bounds, length, rows, read, bounds, per_sequence, per_pick, per_pick,
                        per_sequence, 1024, picks, n)  # fmt: skip
    model(batch, seed=torch.zeros(1, dtype=torch.int64)).loss.backward()
    optimizer.step(1e-4)


def step_cases():
    for preset in ("base", "large"):
        for length, kind in ((128, "adamw"), (512, "lamb")):
            yield f"step of {preset} S{length} {kind}", partial(training_step, preset, length, kind)


def without_logits(*arguments) -> None:
    """The projection as it runs where the logits would be too large."""
    limit, masked_vocab_projection.LOGITS_LIMIT = masked_vocab_projection.LOGITS_LIMIT, 0
    masked_vocab_projection.masked_vocab_projection_fwd(*arguments)
    masked_vocab_projection.LOGITS_LIMIT = limit


def cases(full: bool):
    """(name, dtype's name, launch): BERT-base in bf16; in full all sizes, masks and steps too, base in the others, and
    the widest heads of fp32."""
    both = 0.0, 0.1
    for short, dtype in DTYPES.items() if full else [("bf16", torch.bfloat16)]:
        groups = [row_cases(dtype, 768, both), attention_cases(dtype, 64, both), other_cases(dtype)]
        if full and short == "fp32":
            groups += [attention_cases(dtype, d, both) for d in (96, 128)]
        if full and short == "bf16":
            groups += [row_cases(dtype, h, both) for h in (128, 256, 512, 1024, 2048, 4096, 8192)]
            groups += [attention_cases(dtype, d, both) for d in (16, 24, 32, 48, 80, 96, 128)]
            groups += [attention_cases(dtype, d, both, masks=(1, 2)) for d in (64, 128)] + [step_cases()]
        for name, launch in chain.from_iterable(groups):
            yield name, short, launch


def disassemble(cubin: bytes) -> dict[str, dict]:
    """Resources and instruction counts of each kernel of a cubin, by its (mangled) name."""
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run([*command, file.name], capture_output=True, text=True).stdout
        usage = run(tools.cuobjdump.path, "-res-usage")
        sections = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", run(tools.nvdisasm.path, "-c"), flags=re.MULTILINE)
    rows = {}
    for name, text in zip(sections[1::2], sections[2::2]):
        resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.partition(f"Function {name}:")[2])[:4])
        lines = text.splitlines()
        row = {"registers": int(resources["REG"]), "spill": int(resources["STACK"]) + int(resources["LOCAL"])}
        row |= {column: sum(bool(re.search(pattern, line)) for line in lines) for column, pattern in COUNTS.items()}
        row["tensor_core"] = sorted({m[0] for line in lines if (m := re.search(COUNTS["mma"], line))})
        labels, row["instructions"], row["loops"], exit_at = {}, 0, [], -1
        for line in lines:
            if label := re.match(r"^(\.L_x_\d+):", line):
                labels[label[1]] = row["instructions"]
            elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
                row["instructions"] += 1
                if re.search(r"\*/\s+EXIT", line):
                    exit_at = row["instructions"]
                jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
                if jump and labels.get(jump[1], -1) > exit_at:  # back across an exit: from waits kept out of the way
                    row["loops"].append((labels[jump[1]], row["instructions"]))  # from, to
        row["loop"] = max((end - start for start, end in row["loops"]), default=0)
        rows[name] = row
    return rows


def report(arch: int, name: str, case: str, dtype: str, kwargs: dict, kernel, known: dict) -> dict:
    """One row of the table, with the rules it breaks under "broken"."""
    meta, cubin = kernel.metadata, kernel.asm["cubin"]
    key = hashlib.sha256(cubin).hexdigest()
    known[key] = known.get(key) or disassemble(cubin)[name]
    row = {"kernel": name.removesuffix("_kernel"), "case": f"{dtype} {case}".strip(), "arch": arch} | known[key]
    threads_of_sm, blocks_of_sm, shared_of_sm, shared_of_block, tensor_core = HARDWARE[arch]
    warps, tensor_memory = meta.num_warps, getattr(meta, "tmem_size", 0) or 0
    registers_of_block = -(-row["registers"] * 32 // 256) * 256 * warps
    of_shared, of_tensor = shared_of_sm * 1024 // (meta.shared + 1024), 512 // tensor_memory if tensor_memory else 99
    of_warps, of_registers = threads_of_sm // (32 * warps), 65536 // registers_of_block
    blocks = min(blocks_of_sm, of_warps, of_registers, of_shared, of_tensor)
    row |= {"warps": warps, "shared": meta.shared, "blocks": blocks, "occupancy": blocks * warps * 32 / threads_of_sm}
    tile = kwargs.get("BLOCK_M", 0) * kwargs.get("BLOCK_N", 0) or kwargs.get("ROWS", 1) * kwargs.get("COLUMNS", 0)
    row["elements_per_thread"] = (tile or 1024) / (32 * warps)
    row["per_element"] = row["instructions"] / row["elements_per_thread"]
    row["whole"] = kwargs.get("WHOLE", False)  # one kernel for all gradients of attention

    broken = [f"{meta.shared} B of shared memory"] if meta.shared > shared_of_block * 1024 else []
    if dtype != "fp32":
        broken += [f"{row['spill']} B spilled"] if row["spill"] or row["local"] else []
        if name.startswith(MATRIX) and not any(re.match(tensor_core, m) for m in row["tensor_core"]):
            broken.append("no tensor-core instruction of this generation")
        if not name.startswith(SMALL) and not (row["load128"] or row["store128"]):
            broken.append("no 128-bit access")
    row["broken"] = broken
    return row


def charge_dropout(row: dict, twin: dict) -> None:
    """What dropout costs: the kernel's loop and what is resident of it, against its twin's without dropout."""
    part = "loop" if row["loop"] > 1 else "instructions"
    row["dropout"] = row[part] / row["elements_per_thread"] - twin[part] / twin["elements_per_thread"]
    row["blocks_lost"] = twin["blocks"] - row["blocks"] * row["warps"] / twin["warps"]
    if row["kernel"].startswith("attention") and not row["case"].startswith("fp32"):
        head_size, masked = int(re.search(r" D(\d+)", row["case"])[1]), row["case"].endswith(("causal", "prefix"))
        if row["blocks_lost"] > 1 and head_size > 16:
            row["broken"].append(f"dropout takes {row['blocks_lost']:g} resident blocks of {twin['blocks']}")
        row["dropout_ruled"] = row["kernel"] == "attention_fwd" or (head_size <= 64 and not masked)
        if row["arch"] in (80, 90) and row["dropout_ruled"] and row["dropout"] > 14:
            row["broken"].append(f"dropout adds {row['dropout']:.1f} instructions a score")


def report_architecture(arch: int | str, full: bool, only: str) -> list[dict]:
    known = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    compiled, rows = compile_only(arch), []
    by_hash, launched = {}, {}  # rows by their kernel's hash, and by name and case: a kernel serves many
    register_launchers("CPU")  # so that a model's ops launch them
    linear._forms_again = lambda x, module: False  # as on a GPU
    for case, dtype, launch in cases(full):
        if only not in case:
            continue
        launch()
        if case.startswith("step"):
            rows.append({"kernel": f"{len(compiled)} launches", "case": f"{dtype} {case}", "arch": arch, "broken": []})
        for name, kwargs, kernel in compiled:
            if isinstance(arch, str):
                rows.append({"kernel": name, "case": case, "arch": arch, "broken": []})
                continue
            if kernel.hash not in by_hash:
                by_hash[kernel.hash] = report(arch, name, case, dtype, kwargs, kernel, known)
                rows.append(by_hash[kernel.hash])
            launched[name, f"{dtype} {case}"] = by_hash[kernel.hash]
        compiled.clear()
    if isinstance(arch, int) and not only:
        rows += report_cuda(arch)
    for (name, case), row in launched.items():
        twin = launched.get((name, case.replace("p0.1", "p0.0")))
        if "p0.1" in case and "dropout" not in row and twin and row["whole"] == twin["whole"]:
            charge_dropout(row, twin)
    save({**(json.loads(CACHE.read_text()) if CACHE.exists() else {}), **known}, CACHE)
    return rows


def report_cuda(arch: int) -> list[dict]:
    """The kernels of csrc/cuda as nvcc compiles them for one architecture; no rows where there is no nvcc."""
    nvcc, types = shutil.which("nvcc"), ("float", "__nv_bfloat16", "__half")
    if nvcc is None or f"sm_{arch}" not in subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split():
        return []
    launchers = "embedding_sum_fwd", "embedding_sum_bwd", "segment_sum"
    functions = [f"{launcher}<{t}, cudaStream_t>" for t in types for launcher in launchers]
    source = '#include "embedding_sum.cuh"\n' + "".join(
        f"auto function{i} = &bertfast::{f};\n" for i, f in enumerate(functions)
    )
    kernels, rows = ROOT / "csrc" / "cuda", []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.cu").write_text(source)
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", f"-I{kernels}", "kernels.cu"]
        subprocess.run([*command, "-o", "kernels.cubin"], cwd=folder, check=True)
        found = disassemble((Path(folder) / "kernels.cubin").read_bytes())
    for mangled, row in found.items():
        name = re.search(r"\d+(\w+?)_kernelI", mangled)[1]
        dtype = "bf16" if "__nv_bfloat16" in mangled else "fp16" if "__half" in mangled else "fp32"
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", mangled)]
        row |= {"kernel": name, "case": f"{dtype} CUDA C++ <{', '.join(map(str, numbers))}>", "arch": arch}
        broken = [f"{row['spill']} B spilled"] if dtype != "fp32" and (row["spill"] or row["local"]) else []
        if numbers[0] > 1 and not row["load128"]:  # the first number: elements of an access
            broken.append("no 128-bit load")
        row["broken"] = broken
        if broken or (dtype == "bf16" and numbers[0] > 1):
            rows.append(row)
    return rows


def save(value, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def show(rows: list[dict]) -> None:
    def text(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)

    cells = [COLUMNS, *([text(row.get(c)) for c in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line, row in zip(cells, [None, *rows]):
        mark = "  <<< " + "; ".join(row["broken"]) if row and row["broken"] else ""
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) + mark)


def summary(rows: list[dict]) -> list[dict]:
    """A row an architecture: how many kernels and of which kinds, what they use at most, and which rules they break."""
    made = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        here = [row for row in rows if row["arch"] == arch]
        ruled = [r for r in here if "registers" in r and not r["case"].startswith("fp32")]
        dropped = [r for r in ruled if r.get("dropout_ruled")]
        made.append({
            "key": f"sm_{arch}" if isinstance(arch, int) else arch, "contender": "bertfast", "failed": "",
            "kernels": sum("registers" in r or isinstance(arch, str) for r in here), "ruled": len(ruled),
            "tensor_core": sum(bool(r["mma"]) for r in ruled), "spilled": sum(bool(r["spill"]) for r in ruled),
            "registers": max((r["registers"] for r in ruled), default=None),
            "shared": max((r["shared"] for r in ruled if "shared" in r), default=None),
            "dropout": max((r["dropout"] for r in dropped), default=None),
            "blocks_lost": max((r["blocks_lost"] for r in dropped), default=None),
            "broken": [f"{r['kernel']} {r['case']}: {'; '.join(r['broken'])}" for r in here if r["broken"]],
        })  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all shipped configurations, not BERT-base in bf16 alone")
    parser.add_argument("--arch", default="", help="a list such as 80,90,gfx942")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as D64 or step")
    parser.add_argument("--json", type=Path, default=CACHE.with_name("aot_report.json"), help="where the table goes")
    parser.add_argument("--summary", type=Path, help="a result for benchmarks/results: a row an architecture")
    parser.add_argument("--peers", nargs="?", type=Path, const=Path(), metavar="FOLDER",
                        help="instead: beside other projects' kernels, see benchmarks/aot_peers.py")
    options = parser.parse_args()
    if options.peers is not None and (options.full or options.arch or options.only or options.summary):
        parser.error("--peers compiles everything for sm_80 and sm_90: it takes --json alone")
    from bertfast.benchmarks import aot_peers, contest, report

    names = options.arch or ("80,86,89,90,100,120,gfx942" if options.full else "80,90,100,120")
    archs = [int(a) if a.isdigit() else a for a in names.split(",")]
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1), max_tasks_per_child=1) as pool:
        if options.peers is not None:
            archs = [80, 90]
            folder = options.peers if options.peers != Path() else None
            result = aot_peers.run(archs, pool.map(aot_peers.report_architecture, archs, repeat(folder)))
            report.write(result, options.json)
            return 0
        reports = pool.map(report_architecture, archs, repeat(options.full), repeat(options.only))
        rows = list(chain.from_iterable(reports))
    if not rows:
        parser.error(f"no case's name contains {options.only!r}")
    show(rows)
    save(rows, options.json)
    if options.summary:
        result = {"suite": "aot", **contest.provenance(1), "full": options.full, "rows": summary(rows)}
        result["versions"]["triton"] = triton.__version__
        report.write(result, options.summary)
    broken = sum(bool(row["broken"]) for row in rows)
    kernels = sum("registers" in row or isinstance(row["arch"], str) for row in rows)
    print(f"{kernels} kernels compiled for {', '.join(map(str, archs))}; {broken} break a rule")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
