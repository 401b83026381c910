"""Builds the native parts; everything else stands in pyproject.toml.

  bertfast._C              csrc/loader.cpp, pybind11: planning, masking and packing of batches
  bertfast._C_<isa>        csrc/cpu/*.cpp, once per x86-64 instruction set from the same sources, and never two sets
                           in one object (the linker would merge their inline functions); loaded for this CPU by
                           bertfast/ops/_define.py with torch.ops.load_library
BERTFAST_ISA=avx512_bf16 (a comma-separated list) builds fewer sets; BERTFAST_SANITIZE=address adds the sanitizer.
"""

import os
import platform
from glob import glob

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# -fopenmp: at::parallel_for is silently serial without it. -ffp-contract=off is left out on purpose: a fused
# multiply-add is closer to the exact result.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = AVX2 + ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS = {
    "avx2": AVX2 + ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "avx512": AVX512 + ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    "avx512_bf16": AVX512 + ["-mavx512bf16", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
}


class Build(BuildExtension):
    def build_extension(self, extension):
        """One object folder an extension: the instruction sets share their sources."""
        base, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
        os.makedirs(self.build_temp, exist_ok=True)
        super().build_extension(extension)
        self.build_temp = base


def extensions():
    if os.environ.get("BERTFAST_NO_EXT") == "1":
        return []
    sanitize = [f"-fsanitize={s}" for s in os.environ.get("BERTFAST_SANITIZE", "").split(",") if s]
    headers = glob("csrc/cpu/*.h")
    loader = CppExtension(
        "bertfast._C", ["csrc/loader.cpp"], include_dirs=[pybind11.get_include()], extra_compile_args=FLAGS + sanitize,
        extra_link_args=sanitize,
    )
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return [loader]
    sources = sorted(glob("csrc/cpu/*.cpp"))
    wanted = os.environ.get("BERTFAST_ISA", ",".join(ISAS)).split(",")
    return [loader] + [
        CppExtension(
            f"bertfast._C_{isa}", sources, depends=headers, extra_compile_args=FLAGS + ISAS[isa] + sanitize,
            extra_link_args=sanitize,
        )
        for isa in wanted
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    packages=["bertfast", "bertfast.ops", "bertfast.data", "bertfast.kernels", "bertfast.benchmarks"],
    package_dir={"bertfast.kernels": "kernels", "bertfast.benchmarks": "benchmarks"},
    package_data={"bertfast": ["py.typed"]},
)
