"""Do the tests notice bugs? Each row plants one in a copy of the kernels; the core tests of that op must then fail.

A row: the file, the code, what it becomes. Bugs of the kinds that GPU code has: a lost mask, a missing rescale, a wrong
stride, an int32 offset, a swapped grid, an off-by-one in the sequence bounds, a forgotten factor.
`TRITON_INTERPRET=1 python tests/interpreter/mutants.py [FILE]` prints the survivors; above a tenth it ends with 1.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import bertfast.ops  # noqa: F401 - imported here, once, for all the forked children

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"
TESTS = {  # which core tests can see a bug in which file
    "dropout": "add_layer_norm or attention or dropout",
    "rows": "bias_gelu or second_stage or projection",
    "add_layer_norm": "add_layer_norm or epsilon",
    "layer_norm": "layer_norm or epsilon",
    "bias_gelu": "bias_gelu",
    "gelu_layer_norm": "gelu_layer_norm",
    "attention": "attention",
    "masked_vocab_projection": "projection or sink",
    "optimizer_step": "optimizer",
}
MUTANTS = [
    ("dropout", "first = tl.program_id(1) * COLUMNS", "first = tl.program_id(1)"),
    ("dropout", "other=0.0).to(tl.float32) * kept_scale", "other=0.0).to(tl.float32)"),
    ("dropout", "tl.join(tl.join(k0, k2), tl.join(k1, k3))", "tl.join(tl.join(k0, k1), tl.join(k2, k3))"),
    ("dropout", "column0 // 4 + tl.arange", "column0 // 2 + tl.arange"),
    ("dropout", "sequence, c3, 7)", "sequence, c3, 6)"),
    ("dropout", "(0, 1, 3, 4, 2)", "(0, 1, 4, 3, 2)"),
    ("dropout", "(key >> 32)", "(key >> 31)"),
    ("rows", "tl.range(0, n_partials, BLOCK_ROWS)", "tl.range(0, BLOCK_ROWS, BLOCK_ROWS)"),
    ("rows", "index * tl.num_programs(0) + tl.program_id(0)", "index * tl.num_programs(0)"),
    ("rows", "mask=(rows < n_partials)[:, None] & inside[None, :]", "mask=inside[None, :]"),
    ("rows", "total += tl.load(x_ptr + at", "total = tl.load(x_ptr + at"),
    ("layer_norm", "centred = tl.where(inside, z - mean[:, None], 0.0)", "centred = z - mean[:, None]"),
    ("layer_norm", "/ n_columns + eps)", "/ n_columns)"),
    ("add_layer_norm", "z = tl.where(keep, z * kept_scale, 0.0)", "z = tl.where(keep, z, 0.0)"),
    ("layer_norm", "g - c1[:, None] - c2[:, None] * x_hat", "g - c1[:, None]"),
    ("layer_norm", "tl.store(mean_ptr + rows, mean, mask=rows < n_rows)", "tl.store(mean_ptr + rows, mean)"),
    ("add_layer_norm", "dln_bias += dy", "dln_bias += dz"),
    ("add_layer_norm", "n_rows, tl.num_programs(0) * ROWS,", "n_rows, 2 * tl.num_programs(0) * ROWS,"),
    ("add_layer_norm", "dz = tl.where(keep, dz * kept_scale, 0.0)", "dz = dz * kept_scale"),
    ("add_layer_norm", "column_sum(dx if p > 0.0 else dz,", "column_sum(dz,"),
    ("bias_gelu", "-0.7213475204444817", "-0.7313475204444817"),
    ("bias_gelu", "cdf + z * (", "cdf + ("),
    ("bias_gelu", "tl.program_id(1) * COLUMNS + tl.arange", "tl.arange"),
    ("bias_gelu", "(triton.cdiv(n_rows, rows), triton.cdiv(n_columns, COLUMNS))",
     "(triton.cdiv(n_columns, COLUMNS), triton.cdiv(n_rows, rows))"),
    ("bias_gelu", "tl.where(z < 0.0, q * e, 1.0 - q * e)", "1.0 - q * e"),
    ("gelu_layer_norm", "layer_norm_gradient(dy, gelu(z), weight", "layer_norm_gradient(dy, z, weight"),
    ("gelu_layer_norm", "dx = dz * gelu_derivative(z)", "dx = dz"),
    ("gelu_layer_norm", "dweight += dy * x_hat", "dweight += dy * z"),
    ("gelu_layer_norm", "column_sum(dx,", "column_sum(dy,"),
    ("attention", "visible = (columns < n_keys)[None, :]", "visible = (columns <= n_keys)[None, :]"),
    ("attention", "columns[None, :] <= position[:, None]", "columns[None, :] < position[:, None]"),
    ("attention", "(columns < prefix)[None, :]", "(columns <= prefix)[None, :]"),
    ("attention", "tl.where(inside, position, 0), 0) + 1", "tl.where(inside, position, 0), 0)"),
    ("attention", "last = tl.maximum(last, prefix)", "last = last"),
    ("attention", "out *= rescale[:, None]", "out *= 1.0"),
    ("attention", "total = total * rescale +", "total = total +"),
    ("attention", "out * (kept_scale / total)[:, None]", "out * (1.0 / total)[:, None]"),
    ("attention", "total = tl.where(empty, 1.0, total)", "total = total"),
    ("attention", "rows < n_rows - start - first,", "rows < n_rows - start - first - 1,"),
    ("attention", "start.to(tl.int64) * stride_row", "start * stride_row"),
    ("attention", "v_ptr = head_start(v_ptr, start_k, stride_v_row", "v_ptr = head_start(v_ptr, start_k, stride_k_row"),
    ("attention", "v = load_rows(v_ptr, columns, stride_v_row", "v = load_rows(v_ptr, columns, stride_k_row"),
    ("attention", "k_ptr = head_start(k_ptr, start_k,", "k_ptr = head_start(k_ptr, start_q,"),
    ("attention", "tl.load(cu_k_ptr + sequence + 1) - start_k", "tl.load(cu_k_ptr + sequence + 1) - start_k - 1"),
    ("attention", "((stream << 8) | head)", "(stream << 8)"),
    ("attention", "out.to(tl.float32), 1) / kept_scale", "out.to(tl.float32), 1)"),
    ("attention", "tl.abs(p) * (tl.where(p > 0.0, dp, 0.0) - delta[:, None])", "tl.abs(p) * (dp - delta[:, None])"),
    ("attention", "tl.maximum(p, 0.0)", "tl.abs(p)"),
    ("attention", "dk * (scale * kept_scale)", "dk * kept_scale"),
    ("attention", "other=float(\"inf\")) * LOG2E", "other=float(\"inf\"))"),
    ("attention", "tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks",
     "tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks"),
    ("attention", "tl.range(0, n_queries, BLOCK_M)", "tl.range(0, n_queries - BLOCK_M + 1, BLOCK_M)"),
    ("attention", "if block * BLOCK_N >= n_keys:", "if block * BLOCK_N > n_keys - BLOCK_N:"),
    ("masked_vocab_projection", "total * tl.exp(peak - new_peak)", "total"),
    ("masked_vocab_projection", "tl.where(columns == label, 1.0, 0.0)", "0.0"),
    ("masked_vocab_projection", "dhidden.addmm_(padded[:, even:n_columns], weight[even:])", "pass"),
    ("masked_vocab_projection", "return tl.where(columns < n_columns,", "return tl.where(columns < stride_row,"),
    ("masked_vocab_projection", "if label == IGNORE_INDEX:", "if label == -1:"),
    ("masked_vocab_projection", "tl.store(row_ptr + columns, zeros", "tl.store(row_ptr + columns - first, zeros"),
    ("masked_vocab_projection", "(of_label == peak) & (peak_before < peak)", "of_label == peak"),
    ("masked_vocab_projection", "triton.cdiv(n_columns, 64) * 64", "n_columns // 64 * 64"),
    ("masked_vocab_projection", "return total, (total - before) - more", "return total, excess"),
    ("masked_vocab_projection", "tl.where(tile_peak > peak,", "tl.where(tile_peak >= peak,"),
    ("masked_vocab_projection", "split_total * tl.exp(split_peak - new_peak)", "split_total"),
    ("masked_vocab_projection", "columns = first_column + in_block", "columns = in_block"),
    ("masked_vocab_projection", "tl.where(labelled, 1.0 / total, 0.0)", "1.0 / total"),
    ("masked_vocab_projection", "of_weight = (k < n_columns)[:, None]", "of_weight = (k <= n_columns)[:, None]"),
    ("optimizer_step", "new = value - lr * trust * u", "new = value - lr * u"),
    ("optimizer_step", "u += weight_decay * value", "u += 0.0 * value"),
    ("optimizer_step", "end = tl.load(firsts_ptr + tensor + 1)", "end = tl.load(firsts_ptr + tensor) + 1"),
    ("optimizer_step", "(size > 0.0) & (length > 0.0)", "length > 0.0"),
    ("optimizer_step", "partial_ptr + n_programs + at", "partial_ptr + at"),
    ("optimizer_step", "if tl.load(skip_ptr) != 0.0:", "if tl.load(skip_ptr) == 2.0:"),
    ("optimizer_step", "if start + BLOCK <= size:", "if start + BLOCK <= size + 1000:"),
    ("optimizer_step", "(firsts <= tl.program_id(0))", "(firsts < tl.program_id(0))"),
    ("optimizer_step", "value * (1.0 - lr * weight_decay) - lr * u", "value - lr * u"),
    ("optimizer_step", "tl.sqrt(v / correction2)", "tl.sqrt(v)"),
    ("optimizer_step", "(bits + 0x8000) >> 16", "bits >> 16"),
    ("optimizer_step", "tl.sqrt_rn(tl.sum(total, 0))", "tl.sum(total, 0)"),
]  # fmt: skip


def survives(file: str, code: str, mutated: str) -> bool:
    """Whether the core tests pass with the bug in place; they run in a forked child, which saves the imports."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
        source = (kernels / f"{file}.py").read_text()
        if code not in source:
            raise ValueError(f"{file}.py no longer contains: {code}")
        (kernels / f"{file}.py").write_text(source.replace(code, mutated))
        child = os.fork()
        if child == 0:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            os.environ["MUTATED_KERNELS"] = str(kernels)
            options = ["-x", "-q", "-m", "not full", "-k", TESTS[file], "-p", "no:cacheprovider"]
            os._exit(pytest.main([*options, "--import-mode=importlib", str(HERE)]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, 1):  # 1: a test failed; more: none ran
            raise RuntimeError(f"pytest ended with {status} for {file}: {code}")
        return status == 0


def main() -> int:
    mutants = [m for m in MUTANTS if m[0] in (sys.argv[1:] or TESTS)]
    survivors = []
    for number, mutant in enumerate(mutants):
        survived = survives(*mutant)
        survivors += [mutant] if survived else []
        verdict = "SURVIVES" if survived else "killed"
        print(f"{number + 1}/{len(mutants)} {verdict}  {mutant[0]}: {mutant[1]!r} -> {mutant[2]!r}", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    return 1 if len(survivors) > len(mutants) / 10 else 0


if __name__ == "__main__":
    sys.exit(main())
