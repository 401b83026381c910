"""The GPU's code path compiled for GPUs that are not there: see benchmarks/aot.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_launch_of_a_training_step_compiles(tmp_path):
    """BERT-base and BERT-large, short and long sequences, AdamW and LAMB, with the arguments of a real step."""
    command = [sys.executable, "benchmarks/aot.py", "--full", "--only", "step", "--arch", "80,90,100"]
    done = subprocess.run([*command, "--json", str(tmp_path / "table.json")], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for step in ("base S128 adamw", "base S512 lamb", "large S128 adamw", "large S512 lamb"):
        assert done.stdout.count(f" launches          bf16 step of {step} ") == 3
