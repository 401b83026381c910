"""One run in several processes: torchrun starts them, and each takes its share of every step's batches.

Every process holds the whole model; their gradients meet as fp32 sums before the update (data parallelism: Li et al.
2020, "PyTorch Distributed"). Who takes which batch changes nothing but rounding: masks, dropout and losses are those of
one process that takes them all, and so are the bits where two take a batch each. The first process alone writes files
and shows anything. On GPUs gradients go over NCCL, all else, and everything on CPUs, over gloo.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .files import UserError


def join() -> None:
    """Meet the others, of whom torchrun's environment tells, and take this process's GPU.

    Raises UserError where that fails.
    """
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus:
        if here > gpus:
            raise UserError(f"{here} processes on a machine with {gpus} GPUs: at most one each (--nproc-per-node)")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot connect to the other processes: {error}") from error
    atexit.register(dist.destroy_process_group)


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def total(*numbers: float) -> list[float]:
    """Sums over the processes, each exact up to 2^53. Raises UserError where another process is gone."""
    return _reduced(numbers, dist.ReduceOp.SUM)


def wait() -> None:
    """Until all are here."""
    total(0)


def check_same(what: str, number: float, tolerance: float = 0.0) -> None:
    """Raises UserError, in all processes, where `number` is not one in all, but for `tolerance`, relative."""
    low, high = _reduced((number, -number), dist.ReduceOp.MIN)
    if -high - low > tolerance * abs(low):
        raise UserError(f"the processes differ in {what}; all need the same files and versions, and --out must be a "
                        "folder that all of them see")


def add_up(gradients: Tensor) -> None:
    """Replace a tensor by the sum of all processes' own, in place: the same bits in each of them."""
    with _told():
        dist.all_reduce(gradients)


def _reduced(numbers: tuple[float, ...], op: dist.ReduceOp.RedOpType) -> list[float]:
    if count() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    with _told():
        dist.all_reduce(values, op)
    return values.tolist()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition(". This is")[0]
        raise UserError(f"lost the other processes: {reason}") from error


@contextmanager
def stop_on_interrupt(run: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sets run.stopping, to the exit code, for the end of the step in progress; the second
    interrupts at once, but in several processes, to which torchrun passes on what the terminal sent them already.

    As an exception anywhere it could strike inside C++, which aborts. Only a main thread has signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _) -> None:
        run.stopping = run.stopping or 128 + number
        if count() == 1:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()
