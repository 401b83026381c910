"""The Triton kernels on CPU tensors. Triton picks its interpreter when it is imported, hence another process."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "BERTFAST_NO_EXT": "1"}


def run_pytest(marker: str) -> None:
    """The interpreter keeps one core busy: as many processes share the tests."""
    options = ["-q", "-x", "-m", marker, "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "interpreter")]
    shares = min(4, os.cpu_count() or 1)
    running = [subprocess.Popen(command, env={**ENVIRONMENT, "SHARE": f"{i} {shares}"}, cwd=HERE.parent,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(shares)]
    for process in running:
        output, _ = process.communicate()
        print(output[-2000:])
        assert process.returncode == 0, output[-8000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
class TestInterpreter:
    def test_core(self):
        run_pytest("not full")

    def test_planted_bugs_fit_the_code(self):
        planted = runpy.run_path(str(HERE / "interpreter" / "mutants.py"))
        gone = [(file, code) for file, code, _ in planted["MUTANTS"]
                if code not in (planted["KERNELS"] / f"{file}.py").read_text()]
        assert not gone

    @pytest.mark.full
    def test_full(self):
        run_pytest("full")

    @pytest.mark.full
    def test_planted_bugs_are_noticed(self):
        command = [sys.executable, str(HERE / "interpreter" / "mutants.py")]
        done = subprocess.run(command, env=ENVIRONMENT, cwd=HERE.parent, capture_output=True, text=True)
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
