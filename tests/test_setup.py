"""Building: setup.py and the Makefile, without compiling."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from bertfast import __version__
from bertfast.files import switch
from bertfast.ops import _define

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="no C++ kernels for this machine")
@pytest.mark.parametrize("name, value, code, said", [
    ("BERTFAST_ISA", "avx1024", 1, "BERTFAST_ISA='avx1024' is unknown; known: avx2, avx512, avx512_bf16"),
    ("BERTFAST_ISA", "avx2, avx512", 0, __version__),
    ("BERTFAST_ISA", "", 0, __version__),
    ("BERTFAST_CUDA", "false", 1, "BERTFAST_CUDA='false' is neither 0 nor 1"),
    ("BERTFAST_NO_EXT", "true", 1, "BERTFAST_NO_EXT='true' is neither 0 nor 1"),
])
def test_what_is_built_by_name(name: str, value: str, code: int, said: str) -> None:
    pytest.importorskip("pybind11")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, name: value})
    assert done.returncode == code and (done.stdout + done.stderr).splitlines()[-1] == said


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="no C++ kernels for this machine")
def test_a_build_is_known_by_its_sources(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    program = """
import setuptools
setuptools.setup = lambda ext_modules, **_: print(ext_modules[-1].extra_link_args[-1])
exec(open("setup.py").read())"""
    flag = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).strip()
    subprocess.check_call(["g++", "-shared", "-x", "c++", os.devnull, flag, "-o", str(tmp_path / "made")])
    assert b"csrc:" in (tmp_path / "made").read_bytes()[:4096] and not _define._is_old(tmp_path / "made")


def test_what_runs_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("BERTFAST_REFERENCE", value)
        assert switch("BERTFAST_REFERENCE") == on
    monkeypatch.setenv("BERTFAST_REFERENCE", "true")
    with pytest.warns(UserWarning, match="BERTFAST_REFERENCE=true is neither 0 nor 1, and without effect"):
        assert not switch("BERTFAST_REFERENCE")


def test_kernels_were_built_to_run_on_several_threads() -> None:
    if not (built := list(Path(_define.__file__).parent.parent.glob("_C_avx*.so"))):
        pytest.skip("no C++ kernels were built")
    for library in built:
        assert b"GOMP_parallel" in (content := library.read_bytes()) or b"__kmpc_fork_call" in content, library.name


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


def test_what_is_installed_is_all_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pybind11")
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setenv("BERTFAST_NO_EXT", "1")
    runpy.run_path(str(ROOT / "setup.py"))
    homes = [ROOT / given["package_dir"].get(name, name.replace(".", "/")) for name in given["packages"]]
    assert {file for home in homes for file in home.glob("*.py")} == {
        file for name in ("bertfast", "kernels", "benchmarks") for file in (ROOT / name).rglob("*.py")}
    assert given["package_data"] == {"bertfast": ["py.typed"]}
