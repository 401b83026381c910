"""Builds the native parts; everything else stands in pyproject.toml.

  bertfast._C              csrc/loader.cpp, pybind11: planning, masking and packing of batches
  bertfast._C_autograd     csrc/autograd.cpp, the autograd nodes in C++, for every device
  bertfast._C_<isa>        csrc/cpu/*.cpp, once per x86-64 instruction set from the same sources, and never two sets
                           in one object (the linker would merge their inline functions); loaded for this CPU by
                           bertfast/ops/_define.py with torch.ops.load_library
  bertfast._C_cuda         csrc/cuda/*.cu, by nvcc, where both nvcc and a CUDA build of torch are at hand
BERTFAST_ISA=avx512_bf16 (a comma-separated list) builds fewer sets; BERTFAST_SANITIZE=address adds the sanitizer.
BERTFAST_CUDA=1 builds the CUDA part beside any torch (it uses libtorch's stable ABI alone), BERTFAST_CUDA=0 never.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from glob import glob

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# -fopenmp: at::parallel_for is silently serial without it. -ffp-contract=off is left out on purpose: a fused
# multiply-add is closer to the exact result.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = AVX2 + ["-mprfchw", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS = {
    "avx2": AVX2 + ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "avx512": AVX512 + ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    "avx512_bf16": AVX512 + ["-mavx512bf16", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
}
CUDA_ARCHS = "80", "86", "89", "90", "100", "120"  # of which this nvcc makes what it knows, and PTX of the last


class Build(BuildExtension):
    def build_extension(self, extension):
        """One object folder an extension: the instruction sets share their sources."""
        if extension.name == "bertfast._C_cuda":
            os.makedirs(os.path.dirname(self.get_ext_fullpath(extension.name)), exist_ok=True)
            return subprocess.check_call(nvcc_command(extension.sources, self.get_ext_fullpath(extension.name)))
        base, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        os.makedirs(self.build_temp, exist_ok=True)
        super().build_extension(extension)
        self.build_temp = base


def switch(name, default="0"):
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise SystemExit(f"{name}={value!r} is neither 0 nor 1")
    return value == "1"


def marked(sources):
    """The linker's flag by which bertfast/ops/_define.py tells an old build."""
    digest = hashlib.sha256(b"".join(open(source, "rb").read() for source in sorted(sources))).digest()[:15]
    return f"-Wl,--build-id=0x{(b'csrc:' + digest).hex()}"


def find_nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")


def nvcc_command(sources, target):
    """One command compiles and links: not CUDAExtension, which refuses a CPU build of torch."""
    nvcc, libraries = find_nvcc(), os.path.join(os.path.dirname(torch.__file__), "lib")
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    archs = [a for a in CUDA_ARCHS if f"sm_{a}" in known]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020d000000000000", f"--threads={os.cpu_count() or 1}"]  # torch 2.13
    return [nvcc, *flags, *code, *headers, *sources, "-o", target, f"-L{libraries}", "-ltorch_cpu", "-ltorch"]


def cuda_extension():
    """The CUDA part as a list of one, or none with the reason printed."""
    if not switch("BERTFAST_CUDA", "1" if torch.version.cuda else "0"):
        return []
    if find_nvcc() is None:
        if os.environ.get("BERTFAST_CUDA"):
            raise SystemExit("BERTFAST_CUDA=1, but there is no nvcc: set CUDA_HOME to the CUDA toolkit")
        print("no nvcc found (CUDA_HOME): embedding_sum will run its reference on GPUs")
        return []
    return [Extension("bertfast._C_cuda", sorted(glob("csrc/cuda/*.cu")), depends=glob("csrc/cuda/*.cuh"))]


def extensions():
    if switch("BERTFAST_NO_EXT"):
        return []
    sanitize = [f"-fsanitize={s}" for s in os.environ.get("BERTFAST_SANITIZE", "").split(",") if s]
    headers = glob("csrc/cpu/*.h")
    everywhere = [
        CppExtension(name, [source], include_dirs=[pybind11.get_include()], extra_compile_args=FLAGS + sanitize,
                     extra_link_args=sanitize)
        for name, source in (("bertfast._C", "csrc/loader.cpp"), ("bertfast._C_autograd", "csrc/autograd.cpp"))
    ]
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return everywhere + cuda_extension()
    sources = sorted(glob("csrc/cpu/*.cpp"))
    wanted = [isa.strip() for isa in (os.environ.get("BERTFAST_ISA") or ",".join(ISAS)).split(",")]
    if unknown := [isa for isa in wanted if isa not in ISAS]:
        raise SystemExit(f"BERTFAST_ISA={unknown[0]!r} is unknown; known: {', '.join(ISAS)}")
    return everywhere + cuda_extension() + [
        CppExtension(
            f"bertfast._C_{isa}", sources, depends=headers, extra_compile_args=FLAGS + ISAS[isa] + sanitize,
            extra_link_args=[*sanitize, marked([*sources, *headers])],
        )
        for isa in wanted
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    packages=["bertfast", "bertfast.ops", "bertfast.data", "bertfast.finetune", "bertfast.kernels",
              "bertfast.benchmarks"],
    package_dir={"bertfast.kernels": "kernels", "bertfast.benchmarks": "benchmarks"},
    package_data={"bertfast": ["py.typed"]},
    include_package_data=False,  # what MANIFEST.in adds is for the sdist alone
)
