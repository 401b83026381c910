"""What the launchers ask about a device; a CPU tensor (Triton's interpreter, compiling without a GPU) counts as sm_80."""

from functools import cache

import torch


@cache
def architecture(device: torch.device) -> int:
    """80, 90, 100, ... for CUDA compute capabilities; 942 stands for every ROCm GPU."""
    if device.type != "cuda":
        return 80
    if torch.version.hip:
        return 942
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def backward_programs(device: torch.device) -> int:
    """How many programs share the rows of a backward pass: enough to fill the GPU, few enough for short partial sums."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
