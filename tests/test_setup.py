"""Building: what is asked of setup.py and cannot be had is one line."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bertfast import __version__

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="no C++ kernels for this machine")
@pytest.mark.parametrize("wanted, code, said", [
    ("avx1024", 1, "BERTFAST_ISA='avx1024' is unknown; known: avx2, avx512, avx512_bf16"),
    ("avx2, avx512", 0, __version__),
])
def test_instruction_sets_by_name(wanted: str, code: int, said: str) -> None:
    pytest.importorskip("pybind11")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "BERTFAST_ISA": wanted})
    assert done.returncode == code and (done.stdout + done.stderr).splitlines()[-1] == said
