"""Every test here runs Triton kernels on CPU tensors, in a process of its own (see tests/test_triton_interpreter.py)."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    import torch

    import bertfast.ops
    from bertfast.ops import _define

    from . import checked_interpreter

    checked_interpreter.install()
    torch.set_num_threads(1)
else:
    collect_ignore_glob = ["*.py"]
