"""How an op meets PyTorch's dispatcher, which is the only registry there is.

One schema, and up to three implementations under it:
  CompositeExplicitAutograd   the pure-torch reference: last resort, fake kernel and oracle of the tests
  CPU                         C++, registered by csrc/cpu/<op>.cpp when its shared object is loaded
  CUDA                        the Triton launcher of the same name in kernels/<op>.py, or csrc/cuda/<op>.cu
What autograd sees is a torch.autograd.Function or, for the ops a step calls most often, its twin in C++ (`node`).
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

REFERENCE_ONLY = os.environ.get("BERTFAST_REFERENCE") == "1"
NO_EXTENSION = os.environ.get("BERTFAST_NO_EXT") == "1"

OPS: list[str] = []  # every defined op, in order of definition
_library = torch.library.Library("bertfast", "DEF")
_launchers: dict[str, str] = {}  # op -> module under bertfast.kernels that holds its launcher
_cpu_only: set[str] = set()
NODES = "linear", "gelu_linear", "add_layer_norm", "attention_packed"  # that csrc/cpu/autograd.cpp has
_nodes: dict[str, Callable] = {}  # those, where it is loaded


def define(schema: str, reference: Callable, fake: Callable | None = None, kernels: str | None = None,
           cpu_only: bool = False):
    """Define `bertfast::<op>` and return the function that calls it.

    `reference` takes and returns plain tensors and is registered for every device. It is its own fake kernel
    unless it reads values (cu_seqlens, labels); then `fake` gives the output shapes. `kernels` names the file
    under kernels/ whose function of the op's name is the CUDA launcher. cpu_only: callers give a GPU PyTorch's instead.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertfast::{name}", fake or reference, lib=_library)
    OPS.append(name)
    if cpu_only:
        _cpu_only.add(name)
    if kernels:
        _launchers[name] = kernels
    overload = getattr(torch.ops.bertfast, name).default  # bound once: attribute chains cost time

    def call(*args):
        if _is_fp16_on_cpu(args):
            if not torch.compiler.is_compiling():
                _warn_of_fp16()
            return reference(*args)
        return overload(*args)

    return call


def node(name: str, in_python: Callable) -> Callable:
    """The differentiable op `name`: the autograd node of csrc/cpu/autograd.cpp, where it is there, or `in_python`.

    Both take the same arguments; the first is a tensor, whose dtype decides.
    """
    def call(x: torch.Tensor, *args):
        in_cpp = _nodes.get(name)
        if in_cpp is None or torch.compiler.is_compiling() or x.dtype == torch.float16 and x.device.type == "cpu":
            return in_python(x, *args)
        return in_cpp(x, *args)

    return call


@functools.cache
def _warn_of_fp16() -> None:
    warnings.warn("bertfast: fp16 on CPUs runs the slow references, the C++ kernels take fp32 and bf16", stacklevel=4)


def _is_fp16_on_cpu(args) -> bool:
    """By the first floating-point tensor; the optimiser's tensors come in lists."""
    for a in args:
        a = a[0] if isinstance(a, list) and a else a
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            return a.dtype == torch.float16 and a.device.type == "cpu"
    return False


def register_launchers(dispatch_key: str) -> None:
    """Register every Triton launcher under `dispatch_key`; the kernel files are imported at the first launch."""
    for name, module in _launchers.items():

        def launch(*args, _name=name, _module=module):
            return getattr(importlib.import_module(f"bertfast.kernels.{_module}"), _name)(*args)

        _library.impl(name, launch, dispatch_key, allow_override=True)


def _load_extension() -> str:
    """Load the C++ kernels built for this CPU; returns what was loaded, or the reason why nothing was."""
    if REFERENCE_ONLY:
        return "reference: BERTFAST_REFERENCE=1"
    if NO_EXTENSION:
        return "reference: BERTFAST_NO_EXT=1"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        wanted = ["avx512_bf16", "avx512", "avx2"]
    elif capability == "AVX512":
        wanted = ["avx512", "avx2"]
    elif capability == "AVX2":
        wanted = ["avx2"]
    else:
        return f"reference: the C++ kernels need AVX2, this CPU offers {capability}"
    for isa in wanted:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(__file__).parent.parent / f"_C_{isa}{suffix}"
            if path.exists():
                try:
                    torch.ops.load_library(path)
                except OSError as error:  # built against another torch
                    return f"reference: {path.name} does not load ({str(error).splitlines()[0]}); rebuild it"
                if hasattr(torch.ops.bertfast, NODES[-1]):
                    _nodes.update({name: getattr(torch.ops.bertfast, name).default for name in NODES})
                else:
                    warnings.warn(f"bertfast: {path.name} is an old build, without autograd nodes; rebuild it (make "
                                  "install)", stacklevel=2)
                return f"C++ ({isa})"
    return "reference: the C++ extension is not built (make install)"


def _load_triton() -> str:
    if REFERENCE_ONLY:
        return "reference: BERTFAST_REFERENCE=1"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "reference: triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "reference: Triton uses tensor cores from compute capability 8.0 on"
    register_launchers("CUDA")
    path = Path(__file__).parent.parent / f"_C_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if path.exists() and torch.version.cuda:
        torch.ops.load_library(path)
    return "Triton"


def load_backends() -> dict[str, str]:
    """Load what this machine can run. Called once, when bertfast.ops is imported, after all ops are defined."""
    return {"cpu": _load_extension(), "cuda": _load_triton()}


def implementation(name: str, device: str, loaded: dict[str, str]) -> str:
    """Which implementation of op `name` runs on `device` ("cpu" or "cuda"), and why not a faster one."""
    if device == "cuda" and name in _cpu_only:
        return "PyTorch"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"bertfast::{name}", device.upper())
    if device == "cuda" and loaded[device] == "Triton" and name not in _launchers:
        return "CUDA C++" if has_kernel else "reference: bertfast._C_cuda is not built (it needs nvcc)"
    if has_kernel or loaded[device].startswith(("reference", "no ")):
        return loaded[device]
    return f"reference: no {loaded[device]} kernel for this op"


