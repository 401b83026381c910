"""Building: setup.py and the Makefile, without compiling."""

import os
import platform
import shutil
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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_make_builds_once_and_again_what_was_cleaned(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in (".dependencies", ".built"):
        (tmp_path / ".venv" / name).touch()
    make = lambda *what: subprocess.check_output(["make", *what], cwd=tmp_path, text=True)
    builds = lambda: '-e ".[dev]"' in make("-n", "install")
    assert not builds()
    make("clean")
    assert builds()
