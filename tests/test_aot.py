"""The GPU's code path compiled for GPUs that are not there: see benchmarks/aot.py."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("only", "archs"), [("step", "80,90,100"), ("", "86,90,gfx942")])
def test_every_launch_compiles(only, archs, tmp_path):
    """Steps of BERT-base and BERT-large with the arguments of real ones, and every size, mask and dtype shipped."""
    command = [sys.executable, "benchmarks/aot.py", "--full", "--only", only, "--arch", archs]
    done = subprocess.run([*command, "--json", str(tmp_path / "table.json")], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for step in ("base S128 adamw", "base S512 lamb", "large S128 adamw", "large S512 lamb"):
        assert len(re.findall(rf" launches +bf16 step of {step} ", done.stdout)) == 3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("arguments", "message"), [
    (["--arch", "90", "--only", "no such case"], "no case's name contains 'no such case'"),
    (["--peers", "--only", "step"], "--peers compiles everything for sm_80 and sm_90"),
])
def test_what_compiles_nothing_or_is_not_heeded_is_refused(arguments, message):
    done = subprocess.run([sys.executable, "benchmarks/aot.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


MEASURED = """
from bertfast.benchmarks import aot
from bertfast.kernels import hardware

hardware.tuned_tiles = lambda: {"cross_entropy": [64, 8]}
aot.compile_only(90)
assert hardware.tuned("cross_entropy", (4096, 16)) == (4096, 16)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_was_measured_on_this_machine_is_not_reported_as_shipped():
    subprocess.run([sys.executable, "-c", MEASURED], check=True)


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_peers_are_compiled_beside_ours(tmp_path):
    """Every operation has a row of ours that spills nothing, and Liger-Kernel's go through the same report."""
    command = [sys.executable, "benchmarks/aot.py", "--peers", "--json", str(tmp_path / "peers.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "peers.json").read_text())
    ours = {row["key"]: row for row in result["rows"] if row["contender"] == "bertfast"}
    assert set(ours) == {f"{name}, sm_{arch}" for name in result["remarks"] for arch in (80, 90)}
    assert all(kernel["spill"] == 0 for row in ours.values() for kernel in row["kernels"])
    theirs = [row for row in result["rows"] if row["contender"] == "Liger-Kernel"]
    assert len(theirs) == 2 * 5 and all(1 < row["instructions"] < 100 for row in result["rows"] if row in theirs)
