"""The C++ of csrc/ built with AddressSanitizer, under the tests of the ops and of the loader."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bertfast import ops

ROOT = Path(__file__).parent.parent
ISAS = ["avx2", "avx512", "avx512_bf16", "amx"]
WITHOUT = {"avx512": " -DWITHOUT_BF16 -DWITHOUT_AMX", "avx512_bf16": " -DWITHOUT_AMX", "amx": ""}
EMULATION = f"-I{ROOT / 'tests' / 'avx512_emulation'} -ffp-contract=off --param asan-stack=0"


@pytest.mark.full
@pytest.mark.parametrize("isa", ISAS)
def test_cpp_touches_no_memory_that_is_not_its_own(isa, tmp_path):
    """And is right, for each instruction set: those that this CPU lacks are emulated."""
    loaded = ops.backends()["add_layer_norm_fwd"]["cpu"]
    if not loaded.startswith("C++"):
        pytest.skip(loaded)
    emulated = ISAS.index(isa) > ISAS.index(loaded.removeprefix("C++ (").removesuffix(")"))
    built = "avx2" if emulated else isa
    # the second, or the sanitizer does not find what throws
    names = ("libasan.so", "libstdc++.so")
    runtime = " ".join(subprocess.check_output(["g++", f"-print-file-name={n}"], text=True).strip() for n in names)
    library, objects = tmp_path / "library", tmp_path / "objects"
    shutil.copytree(ROOT / "bertfast", library / "bertfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = {**os.environ, "BERTFAST_SANITIZE": "address", "BERTFAST_ISA": built, "BERTFAST_CUDA": "0"}
    if emulated:
        build["CFLAGS"] = EMULATION + WITHOUT[isa]
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(library), "--build-temp", str(objects)]
    done = subprocess.run(command, env=build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

    environment = {**os.environ, "PYTHONPATH": str(library), "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    where = ("import torch, bertfast, bertfast._C as c; print(bertfast.__file__, c.__file__, bertfast.ops.backends());"
             "gemm = torch._C._dispatch_has_kernel_for_dispatch_key('bertfast::gemm', 'CPU');"
             "print('bf16', gemm and torch.ops.bertfast.gemm_multiplies_bf16())")  # fmt: skip
    found = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True, cwd=tmp_path)
    said = found.stdout + found.stderr[-4000:]
    has_bf16 = isa in ("avx512_bf16", "amx")
    assert found.stdout.count(str(library)) == 2 and f"C++ ({built})" in said and f"bf16 {has_bf16}" in said, said
    tests = [str(ROOT / "tests" / name) for name in ("test_ops.py", "test_data.py")]
    # torch.compile starts compilers of its own, which have nothing to do with this C++
    wanted = "not compiles" + (" and masked_vocab_projection" if isa == "amx" else "")  # all that asks for AMX
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not full", "-k", wanted, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *tests], env=environment, cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout[-1000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
