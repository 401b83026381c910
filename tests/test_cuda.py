"""The CUDA C++ kernels on a CPU: compiled by g++ with tests/cuda_emulation in place of CUDA, under sanitizers."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from bertfast.benchmarks.cases import CASES, STREAM, run

from bertfast.ops.dropout import keep_scale, threshold

ROOT = Path(__file__).parent.parent
KERNELS, EMULATION = ROOT / "csrc" / "cuda", Path(__file__).parent / "cuda_emulation"
ELEMENTS = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
# ids within one pack, odd columns, the widths of BERT, rows shared by several warps; more pieces than one launch merges
SHAPES = ((37, 128), (5, 203), (70, 768), (300, 64), (9, 2056), (2, 8192), (3, 1100), (0, 64), (1, 512), (4200, 8))
SMALL = 2**-6
CASE = CASES["embedding_sum"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def build(dtype: torch.dtype, kernels: Path = KERNELS, optimize: str = "-O1") -> Path:
    """The program of tests/cuda_emulation/embedding_sum.cpp for one dtype, kept by the hash of its sources."""
    sources = [*sorted(kernels.glob("*.cuh")), *sorted(EMULATION.glob("*.*"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    program = ROOT / "build" / "cuda_emulation" / f"embedding_sum-{ELEMENTS[dtype].strip('_')}-{digest}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", optimize, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        command = ["g++", *flags, f"-DELEMENT={ELEMENTS[dtype]}", f"-I{EMULATION}", f"-I{kernels}"]
        subprocess.run([*command, str(EMULATION / "embedding_sum.cpp"), "-o", str(unfinished)], check=True)
        unfinished.replace(program)
    return program


def emulate(program: Path, folder: Path, t: dict, p: float, *, n_blocks=2, backwards=False, sink=None) -> dict:
    """Forward and backward by the emulated kernels, named as `run` names them; `sink`: what dword is added to."""
    folder.mkdir()
    dtype = t["word"].dtype
    into = {f"d{name}": torch.zeros_like(t[name]) for name in CASE.differentiable}
    into["dword"] = into["dword"] if sink is None else sink
    for name, tensor in {**t, **into}.items():
        (folder / name).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    numbers = {
        "n_rows": t["dy"].shape[0], "n_columns": t["dy"].shape[1], "n_blocks": n_blocks, "eps": 1e-12, "p": p,
        "threshold": threshold(p), "scale": keep_scale(p), "stream": STREAM, "has_key": 1, "padding_idx": 0,
        "float_sink": int(into["dword"].dtype != dtype),
    }  # fmt: skip
    (folder / "numbers").write_text("\n".join(f"{name} {value!r}" for name, value in numbers.items()))
    environment = {**os.environ, **({"BACKWARDS": "1"} if backwards else {})}
    done = subprocess.run([program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]

    def read(name, like):
        data = bytearray((folder / name).read_bytes())
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape) if data else torch.empty_like(like)

    return {"y": read("y", t["dy"]), **{name: read(f"new_{name}", like) for name, like in into.items()}}


def assert_no_further(name, fused, eager, truth):
    """The parity contract's rule, as in tests/test_ops.py."""
    assert torch.isfinite(fused).all(), name
    if truth.numel():
        error, allowed = ((side.double() - truth).abs().max().item() for side in (fused, eager))
        ulps = 4 if fused.dtype == torch.float32 else 2
        tiny = ulps * torch.finfo(fused.dtype).eps * truth.abs().max().item() + 1e-30
        assert error <= allowed + tiny, f"{name}: error {error:.3g}, eager {allowed:.3g} + {tiny:.3g}"


def inputs(shape, dtype: torch.dtype, scale: float) -> dict:
    """CASE's, the three tables times `scale`."""
    tables = ("word", "position", "token_type")
    return {name: t * scale if name in tables else t for name, t in CASE.inputs(shape, dtype).items()}


def check(program, tmp_path, shape, dtype, p, scale=1.0) -> None:
    tensors = inputs(shape, dtype, scale)
    truth = run(CASE.eager, CASE, inputs(shape, torch.float64, scale), p)
    eager = run(CASE.eager, CASE, tensors, p)
    ours = emulate(program, tmp_path / "forwards", tensors, p)
    for name in truth:
        assert_no_further(name, ours[name], eager[name], truth[name])
    assert torch.equal(ours["y"] == 0, eager["y"] == 0), "other elements are dropped"
    assert p == 0 or shape[0] == 0 or (ours["y"] == 0).any()
    again = emulate(program, tmp_path / "backwards", tensors, p, backwards=True)
    assert all(torch.equal(ours[name], again[name]) for name in ours), "the order of blocks or threads matters"


def table():
    for dtype in ELEMENTS:
        for index, shape in enumerate(SHAPES):
            for p in (0.0, 0.1):
                core = dtype == torch.bfloat16 and index < 4 and p > 0
                yield pytest.param(dtype, shape, p, marks=() if core else pytest.mark.full)


@pytest.mark.parametrize(("dtype", "shape", "p"), list(table()), ids=str)
def test_embedding_sum(dtype, shape, p, tmp_path):
    check(build(dtype), tmp_path, shape, dtype, p)


def test_embedding_sum_of_small_values(tmp_path):
    """The variance is 3e-4, so that an eps which is not 1e-12 shows."""
    check(build(torch.bfloat16), tmp_path, (37, 128), torch.bfloat16, 0.1, SMALL)


def test_embedding_sum_adds_to_a_float32_sink(tmp_path):
    tensors, sink = CASE.inputs((70, 256), torch.bfloat16), torch.full((50, 256), 3.0)
    truth = run(CASE.eager, CASE, CASE.inputs((70, 256), torch.float64), 0.1)["dword"]
    got = emulate(build(torch.bfloat16), tmp_path / "sink", tensors, 0.1, sink=sink)["dword"]
    torch.testing.assert_close(got, (truth + 3).float(), rtol=0, atol=1e-5 * truth.abs().max().item())


MUTANTS = [  # file, code, what it becomes
    ("common.cuh", "round < 7", "round < 6"),
    ("common.cuh", "first / 4 + 32 * pair + lane", "first / 4 + lane"),
    ("common.cuh", "group / 2 == pair && word == w", "group / 2 == pair && word == (w ^ 1)"),
    ("common.cuh", "lane * VECTOR % 16;", "0;"),
    ("common.cuh", "step = WARP / 2", "step = WARP / 4"),
    ("common.cuh", "if (column < n_columns) f(", "f("),
    ("common.cuh", "      __syncthreads();  // everyone has read the sums before these\n", ""),
    ("common.cuh", "of_warps[threadIdx.x / WARP] = x;\n      __syncthreads();", "of_warps[threadIdx.x / WARP] = x;"),
    ("common.cuh", "row_key >> 32", "row_key >> 31"),
    ("embedding_sum.cuh", "if (row >= n_rows) return;", "if (row > n_rows) return;"),
    ("embedding_sum.cuh", "ids.token_type[row] * n_columns", "ids.token_type[row]"),
    ("embedding_sum.cuh", "/ n_columns + eps", "/ n_columns + eps + 1e-3f"),
    ("embedding_sum.cuh", "to_float(dy_pack.values[i]) * dropout.scale : 0.f", "to_float(dy_pack.values[i]) : 0.f"),
    ("embedding_sum.cuh", "- c1 - c2 *", "- c1 + c2 *"),
    ("embedding_sum.cuh", "row += static_cast<int64_t>(gridDim.x) * S::ROWS", "row += gridDim.x"),
    ("embedding_sum.cuh", "begin + PIECE < n ? begin + PIECE : n", "begin + PIECE"),
    ("embedding_sum.cuh", "if (whole || cut == 1) {", "if (whole) {"),
    ("embedding_sum.cuh", "if (id == skipped) return;", ""),
    ("embedding_sum.cuh", "if (next_id[k] == NO_SEGMENT) continue;", ""),
    ("embedding_sum.cuh", "order ? order[i] : i", "i"),
    ("embedding_sum.cuh", "first + k < end ? first + k : end - 1", "first + k"),
    ("embedding_sum.cuh", "first + k >= end ? NO_SEGMENT : ids ? ids[at] : 0", "ids ? ids[at] : 0"),
    ("embedding_sum.cuh", "ids ? ids[at] : 0", "ids ? ids[i] : 0"),
    ("embedding_sum.cuh", "cuts += n * n_columns, cut_ids += n;", ""),
    ("embedding_sum.cuh", "if (pieces == 1) break;", "break;"),
]  # fmt: skip


# small rows, small values, cut segments, several warps a row, more pieces than one launch merges
PLANTED_SEE = ((37, 128), 1.0), ((37, 128), SMALL), ((300, 64), 1.0), ((9, 2056), 1.0), ((4200, 8), 1.0)


def test_planted_bugs_fit_the_code():
    assert not [(file, code) for file, code, _ in MUTANTS if code not in (KERNELS / file).read_text()]


@pytest.mark.full
def test_planted_bugs_are_noticed(tmp_path):
    survivors = []
    for number, (file, code, mutated) in enumerate(MUTANTS, 1):
        folder = tmp_path / str(number)
        shutil.copytree(KERNELS, folder / "kernels")
        source = (folder / "kernels" / file).read_text()
        (folder / "kernels" / file).write_text(source.replace(code, mutated))
        program = build(torch.bfloat16, folder / "kernels", "-O0")  # half the time of -O1
        try:
            for shape, scale in PLANTED_SEE:
                check(program, folder, shape, torch.bfloat16, 0.1, scale)
                shutil.rmtree(folder / "forwards"), shutil.rmtree(folder / "backwards")
            survivors.append((file, code, mutated))
            verdict = "SURVIVES"
        except AssertionError as error:
            verdict = f"killed by {shape}: {str(error).splitlines()[0][:80]}"
        finally:
            program.unlink()
        print(f"{number}/{len(MUTANTS)} {file}: {code!r} -> {mutated!r} {verdict}", flush=True)
    assert len(survivors) <= len(MUTANTS) / 10, survivors
