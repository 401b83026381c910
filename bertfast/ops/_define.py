"""How an op meets PyTorch's dispatcher, which is the only registry there is.

One schema, and up to three implementations under it:
  CompositeExplicitAutograd   the pure-torch reference: last resort, fake kernel and oracle of the tests
  CPU                         C++, registered by csrc/cpu/<op>.cpp when its shared object is loaded
  CUDA                        the Triton launcher of the same name in kernels/<op>.py, or csrc/cuda/<op>.cu
What autograd sees is a torch.autograd.Function or, for the ops a step calls most often, its twin in C++ (`node`).
"""

import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import forward_ad

from bertfast.files import switch

REFERENCE_ONLY = switch("BERTFAST_REFERENCE")
NO_EXTENSION = switch("BERTFAST_NO_EXT")
NO_GPU = "no CUDA device"
TOO_OLD = "Triton uses tensor cores from compute capability 8.0 on"

OPS: list[str] = []  # every defined op, in order of definition
_library = torch.library.Library("bertfast", "DEF")
_launchers: dict[str, tuple[str, Callable]] = {}  # op -> module under bertfast.kernels with its launcher; reference
_cpu_only: set[str] = set()
NODES = "linear", "gelu_linear", "add_layer_norm", "attention_packed"  # that csrc/autograd.cpp has
_nodes: dict[str, Callable] = {}  # those, where it is loaded


def define(schema: str, reference: Callable, fake: Callable | None = None, kernels: str | None = None,
           cpu_only: bool = False):
    """Define `bertfast::<op>` and return the function that calls it.

    `reference` takes and returns plain tensors and is registered for every device. It is its own fake kernel
    unless it reads values (cu_seqlens); then `fake` gives the output shapes. `kernels` names the file
    under kernels/ whose function of the op's name is the CUDA launcher. cpu_only: callers give a GPU PyTorch's instead,
    and autograd a node around it.
    """
    name = schema.partition("(")[0]
    reference = _contiguous(reference)
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertfast::{name}", fake or reference, lib=_library)
    OPS.append(name)
    if cpu_only:
        _cpu_only.add(name)
    if kernels:
        _launchers[name] = kernels, reference
    overload = getattr(torch.ops.bertfast, name).default  # bound once: attribute chains cost time

    def call(*args):
        if cpu_only and _is_differentiated(args):
            raise RuntimeError(f"bertfast.ops.{name} has no derivative, neither backward nor forward")
        if (x := _without_kernel(args)) is not None:
            if not torch.compiler.is_compiling():
                _warn_of_reference(x.dtype, x.device)
            return reference(*args)
        return overload(*args)

    return call


def _is_differentiated(args) -> bool:
    """Whether a derivative is asked for of what an op without an autograd node would make a constant."""
    backward, forward = torch.is_grad_enabled(), forward_mode()
    if not (backward or forward):  # in inference a look at each tensor would take as long as a small product
        return False
    tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    return any(backward and t.requires_grad or forward and forward_ad.unpack_dual(t).tangent is not None
               for t in tensors)


def _contiguous(reference: Callable) -> Callable:
    """The reference with outputs that lie in memory as the kernels' do: torch.compile believes their strides."""
    dense = lambda out: out.contiguous() if isinstance(out, torch.Tensor) else out

    @functools.wraps(reference)
    def call(*args):
        out = reference(*args)
        return type(out)(map(dense, out)) if isinstance(out, (tuple, list)) else dense(out)

    return call


def node(name: str, in_python: Callable) -> Callable:
    """The differentiable op `name`: the autograd node of csrc/autograd.cpp, where it is there, or `in_python`.

    Both take the same arguments; the first is a tensor, whose dtype decides.
    """
    def call(x: torch.Tensor, *args):
        in_cpp = _nodes.get(name)
        if in_cpp is None or torch.compiler.is_compiling() or _without_kernel((x,)) is not None:
            return in_python(x, *args)
        return in_cpp(x, *args)

    return call


def once_differentiable(backward: Callable) -> Callable:
    """A backward that refuses create_graph=True. PyTorch's decorator of the name fails only where the incoming gradient
    has one itself, which a loss's has not: a penalty on gradients would be left out in silence."""
    @functools.wraps(backward)
    def call(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiled backward refuses by itself
            raise RuntimeError("bertfast's ops have no second derivative: create_graph=True is not for them")
        return backward(ctx, *grads)

    return call


def distinct(*tensors: torch.Tensor):
    """The tensors, what comes twice as a view of itself: the compiler refuses one tensor as two inputs of a node."""
    if not torch.compiler.is_compiling():
        return tensors
    return [t.view(t.shape) if any(t is earlier for earlier in tensors[:i]) else t for i, t in enumerate(tensors)]


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """fp32 inside every op, fp64 where the inputs are (the oracle of the tests)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward_mode() -> bool:
    """Whether forward-mode AD is on, to which an op without an autograd node would be a constant."""
    return forward_ad._current_level >= 0


@functools.cache
def _judged(gpu: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(gpu) < (8, 0)


@torch.compiler.assume_constant_result
def _too_old(gpu: torch.device) -> bool:
    """Asked when a GPU is met, not at import: it initialises CUDA, which no forked child could use then."""
    return _judged(gpu)


@functools.cache
def _warn_of_reference(dtype: torch.dtype, device: torch.device) -> None:
    takes = "fp32, bf16 and, but in the optimiser, fp64" if device.type == "cpu" else "fp32, bf16 and fp16"
    why = TOO_OLD if device.type == "cuda" and _too_old(device) else f"the kernels take {takes}"
    warnings.warn(f"bertfast: {dtype} on {device.type} runs the slow references, {why}", stacklevel=4)


@functools.cache
def _warn_of_lack(error: str) -> None:
    warnings.warn(f"bertfast: {error}; the slow reference runs", stacklevel=2)


def _without_kernel(args) -> torch.Tensor | None:
    """The first floating-point tensor, where its GPU is too old, or its device's kernels do not take its dtype: fp16 on
    a CPU, fp64 elsewhere, and in the optimiser's ops, whose tensors come in lists, on a CPU too."""
    for a in args:
        listed = isinstance(a, list) and bool(a)
        a = a[0] if listed else a
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            if a.device.type == "cpu" and not listed:
                return a if a.dtype == torch.float16 else None
            if a.is_cuda and _too_old(a.device):
                return a
            return a if a.dtype == torch.float64 or a.dtype == torch.float16 and a.device.type == "cpu" else None
    return None


def register_launchers(dispatch_key: str) -> None:
    """Register every Triton launcher under `dispatch_key`; the kernel files are imported at the first launch.

    What a launcher does not do, by its NotImplementedError, the reference does.
    """
    for name, (module, reference) in _launchers.items():

        def launch(*args, _name=name, _module=module, _reference=reference):
            try:
                return _launch(getattr(importlib.import_module(f"bertfast.kernels.{_module}"), _name), args)
            except NotImplementedError as error:
                _warn_of_lack(str(error))
                return _reference(*args)

        _library.impl(name, launch, dispatch_key, allow_override=True)


def _launch(launcher: Callable, args: tuple):
    """Call a launcher on its tensors' device, which need not be the current one: Triton launches on that one.

    Biases, labels and row keys (n,) of any stride become contiguous: the kernels read them so.
    """
    args = tuple(a.contiguous() if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in args)
    first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
    if not (isinstance(first, torch.Tensor) and first.is_cuda) or first.device.index == torch.cuda.current_device():
        return launcher(*args)
    with torch.cuda.device(first.device):
        return launcher(*args)


def _built(name: str) -> Path | None:
    """The shared object bertfast/<name>, where it is built."""
    paths = (Path(__file__).parent.parent / (name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _is_old(path: Path) -> bool:
    """Whether the kernels were built from other sources than lie here: loading them may abort, past all catching."""
    csrc, head = Path(__file__).parents[2] / "csrc/cpu", path.read_bytes()[:4096]
    sources = sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")])  # none beside an installed wheel
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).digest()[:15]
    return bool(sources) and b"csrc:" in head and b"csrc:" + digest not in head  # as setup.py marks them


def _load_nodes(cpu: str) -> None:
    """Load the autograd nodes in C++, which serve every device; without them those in Python run, more slowly."""
    if REFERENCE_ONLY or NO_EXTENSION:
        return
    path, why = _built("_C_autograd"), ""
    if path is None:
        why = "an old build" if cpu.startswith("C++") else ""
    else:
        try:
            torch.ops.load_library(path)
            _nodes.update({name: getattr(torch.ops.bertfast, name).default for name in NODES})
        except OSError as error:  # built against another torch
            why = str(error).splitlines()[0]
    if why:
        warnings.warn(f"bertfast: no autograd nodes in C++ ({why}); rebuild them (make clean install)", stacklevel=2)


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
        if (path := _built(f"_C_{isa}")) is not None:
            if _is_old(path):
                return f"reference: {path.name} is an old build; rebuild it (make clean install)"
            try:
                torch.ops.load_library(path)
            except OSError as error:  # built against another torch
                why = str(error).splitlines()[0]
                return f"reference: {path.name} does not load ({why}); rebuild it (make clean install)"
            return f"C++ ({isa})"
    return "reference: the C++ extension is not built (make install)"


def _load_triton() -> str:
    """Register what a GPU would run, without a look at one (see `_too_old`)."""
    if REFERENCE_ONLY:
        return "reference: BERTFAST_REFERENCE=1"
    if not torch.backends.cuda.is_built():
        return NO_GPU
    if importlib.util.find_spec("triton") is None:
        return "reference: triton is not installed"
    register_launchers("CUDA")
    if (path := _built("_C_cuda")) is not None and torch.version.cuda:
        try:
            torch.ops.load_library(path)
        except OSError as error:  # built against another torch
            why = str(error).splitlines()[0]
            warnings.warn(f"bertfast: {path.name} does not load ({why}); rebuild it (make clean install)", stacklevel=2)
    return "Triton"


def load_backends() -> dict[str, str]:
    """Load what this machine can run. Called once, when bertfast.ops is imported, after all ops are defined."""
    cpu, cuda = _load_extension(), _load_triton()
    _load_nodes(cpu)
    return {"cpu": cpu, "cuda": cuda}


def implementation(name: str, device: str, loaded: dict[str, str]) -> str:
    """Which implementation of op `name` runs on `device` ("cpu" or "cuda"), and why not a faster one."""
    if device == "cuda" and name in _cpu_only:
        return "PyTorch"
    where = loaded[device]
    if where == "Triton" and not torch.cuda.is_available():
        where = NO_GPU
    elif where == "Triton" and _too_old(torch.device("cuda", torch.cuda.current_device())):
        where = f"reference: {TOO_OLD}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"bertfast::{name}", device.upper())
    if where == "Triton" and name not in _launchers:
        return "CUDA C++" if has_kernel else "reference: bertfast._C_cuda is not built (it needs nvcc)"
    if has_kernel or where.startswith(("reference", "no ")):
        return where
    return f"{'PyTorch' if name in _cpu_only else 'reference'}: no {where} kernel for this op"
