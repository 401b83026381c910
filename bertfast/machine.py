"""What this machine offers: precision, GEMM rate, allocator; each with its reason in words."""

import ctypes
import mmap
import os
import platform
import time

import torch

from .files import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason) for `auto`, `fp32`, `bf16` or `fp16`. Raises UserError for what the device cannot do."""
    check_precision(wanted)
    if wanted != "auto":
        if wanted == "fp16" and device.type == "cpu":
            raise UserError("fp16 trains on GPUs only; on CPUs use --precision bf16 or fp32")
        if wanted == "bf16" and not multiplies_bf16(device):
            return wanted, "asked for; PyTorch's products of bf16 are slow on this CPU, fp32 is many times faster"
        return wanted, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has bf16 tensor cores"
        return "fp16", "the GPU has no bf16; loss scaling is on"
    if not torch.cpu._is_avx512_bf16_supported():
        return "fp32", "the CPU has no bf16 instructions"
    # some CPUs with bf16 instructions multiply faster in fp32: a bf16 dot product at half the rate of two FMAs
    bf16, fp32 = (gemm_rate(dtype, device) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    rates = f"GEMM {bf16:,.0f} GFLOP/s in bf16, {fp32:,.0f} in fp32"
    return ("bf16", f"the CPU has bf16: {rates}") if bf16 > fp32 else ("fp32", f"faster than bf16 here: {rates}")


def check_precision(wanted: str) -> None:
    if wanted not in ("auto", *DTYPES):
        raise UserError(f"precision {wanted!r} is unknown; known: auto, {', '.join(DTYPES)}")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are worth a try: on CPUs oneDNN's, which without AVX-512 are not there, when PyTorch's
    run on one core, and with AVX-512 alone, without its bf16, take five times as long as fp32's."""
    if device.type != "cpu":
        return True
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_avx512_bf16_supported()


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the better of `mm` at 1024^3 and 2048^3, on a GPU 4096^3 and 8192^3: what "share of peak" is of.

    What takes longer than two seconds is not repeated.
    """
    best, began = 0.0, time.perf_counter()
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        for _ in range(6):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
            if time.perf_counter() - began > 2:
                return best
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_pages() -> str:
    """Tell glibc to keep freed memory, in huge pages: a fresh page costs more than the arithmetic on it.

    For programs (the CLI, the benchmarks), never on import. Returns what was done, in words.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "default allocator (page keeping is for glibc)"
    import resource  # which Windows lacks

    M_TRIM_THRESHOLD, M_MMAP_MAX, M_TOP_PAD = -1, -4, -2
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1) and libc.mallopt(M_TOP_PAD, 64 << 20)):
        return "default allocator (mallopt refused)"
    # the heap grows at once, by addresses alone, so that all it will hold has been advised
    huge, room = 2 << 20, min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, 16 << 30)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY  # then addresses are what is scarce
    if limited or not (start := libc.malloc(room)):
        return "glibc keeps freed pages (mallopt)"
    first = -(-start // huge) * huge
    advised = libc.madvise(first, start + room - first, mmap.MADV_HUGEPAGE) == 0
    libc.free(start)
    return "glibc keeps freed pages (mallopt)" + (", huge ones where Linux has them (madvise)" if advised else "")


def threads(n: int) -> str:
    return f"{n} thread{'s' * (n != 1)}"


def describe() -> dict[str, str]:
    """What `bertfast doctor` prints: versions, devices, precision, kernels, allocator."""
    from .ops import backends
    from .version import __version__

    device = choose_device()
    precision, reason = choose_precision("auto", device)
    rows = {
        "bertfast": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {threads(torch.get_num_threads())}",
        "cpu": torch.backends.cpu.get_cpu_capability()
        + (" with bf16" if torch.cpu._is_avx512_bf16_supported() else ", no bf16"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none found",
        "precision": f"{precision}: {reason}",
        "allocator": keep_pages(),
        "loader": loader_implementation(),
    }
    for name, where in backends().items():
        rows[name] = f"cpu: {where['cpu']}   cuda: {where['cuda']}"
    for name in ("fp32", precision):
        rows[f"GEMM rate {name}"] = f"{gemm_rate(DTYPES[name], device) / 1e9:,.0f} GFLOP/s"
    return rows


def loader_implementation() -> str:
    """What plans, masks and packs the batches, and why not the faster."""
    from .data import plan

    return "C++" if plan._C else "numpy, slower: bertfast._C is not built (make install) or BERTFAST_NO_EXT=1"
