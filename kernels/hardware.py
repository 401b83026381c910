"""What the launchers ask about the GPU they run on, and the tiles that `bertfast bench tune` measured there."""

import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from bertfast.files import UserError, read_json
from bertfast.version import __version__


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


def tiles_file(gpu: str) -> Path:
    """Where the tiles measured on a GPU of this name lie."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # also where nobody has a home
    return folder / "bertfast" / f"tiles-{re.sub('[^a-z0-9]+', '-', gpu.lower())}.json"


def made_with() -> dict[str, str]:
    """What measured tiles depend on, besides the GPU."""
    return {"bertfast": __version__, "triton": triton.__version__}


def read_tiles(gpu: str) -> dict[str, Any]:
    """The tiles measured on this GPU, by the keys of `tuned`; with other versions measured ones are not used."""
    path = tiles_file(gpu)
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("tiles"), dict):
        raise UserError(f"{path} is damaged: it has no tiles")
    if any(found.get(name) != version for name, version in made_with().items()):
        warnings.warn(f"{path} was measured with other versions and is not used: run bertfast bench tune", stacklevel=2)
        return {}
    return found["tiles"]


@cache
def tiles_of(device: int) -> dict[str, Any]:
    """`read_tiles` of one of this process's GPUs, read once."""
    return read_tiles(torch.cuda.get_device_name(device))


def tuned_tiles() -> dict[str, Any]:
    """Those of the current GPU; empty without one."""
    return tiles_of(torch.cuda.current_device()) if torch.cuda.is_initialized() else {}


def tuned(key: str, shipped: Any) -> Any:
    """What `bertfast bench tune` measured on this GPU under `key`, a kernel and its sizes; else what is shipped."""
    return tuned_tiles().get(key, shipped)
