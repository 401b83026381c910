"""Triton kernels on CPU tensors, in a process of its own (see tests/test_triton_interpreter.py)."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import bertfast.kernels
    import pytest
    import torch

    from bertfast.ops import _define, linear

    from . import checked_interpreter

    if "MUTATED_KERNELS" in os.environ:  # see mutants.py
        bertfast.kernels.__path__ = [os.environ["MUTATED_KERNELS"]]
    checked_interpreter.install()
    checked_interpreter.follow_addresses()
    _define.register_launchers("CPU")
    _define._without_kernel = lambda args: None  # the launchers take fp16
    linear._forms_again = lambda x, module: False  # as on a GPU
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN: what is not written shows
    torch.utils.deterministic.fill_uninitialized_memory = True

    @pytest.hookimpl(trylast=True)  # of those that the markers leave
    def pytest_collection_modifyitems(config, items):
        """Of several processes that share the tests each takes every nth."""
        own, shares = map(int, os.environ.get("SHARE", "0 1").split())
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % shares != own])
        items[:] = items[own::shares]
else:
    collect_ignore_glob = ["*.py"]
