"""What the launchers ask about the GPU they run on."""

from functools import cache

import torch
import triton


def architecture() -> int | str:
    """80, 90, 100, … for CUDA compute capabilities, "gfx942" and the like on ROCm: the target of Triton's driver.

    In Triton's interpreter, which has no target, it is 80.
    """
    if triton.knobs.runtime.interpret:
        return 80
    return triton.runtime.driver.active.get_current_target().arch


@cache
def backward_programs(device: torch.device) -> int:
    """How many programs share the rows of a backward pass: they fill the GPU, and their partial sums stay short."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count
