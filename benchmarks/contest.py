"""How every end-to-end suite measures: contenders in processes of their own, taking turns.

A contender is a generator function. What it yields first are its facts (what it computed with dropout off: they must
agree before anything is timed); every later `next` is one turn and yields {"seconds": ...} and more. They start one
after another (from eight cores on a few side by side), then take turns, round by round, so that a change of clock or a
busy neighbour hits all of them. Figures are medians over the rounds, with the spread beside them. Where memory does not
hold all at once they run in heats, with the first in each of them, whose median is the pace that the others' seconds
are divided by. A contender that fails, dies, takes too long or computes something else is reported as such, never
dropped.
"""

import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bertfast import machine
from bertfast.report import HonestConsole
from bertfast.version import __version__

NO_BF16 = "left out: no fast bf16 here"
PATIENCE = 1200  # seconds for a start (compilation) or a turn
MEASURED_COPY = 256 << 20  # bytes: beyond the caches of most machines

console = HonestConsole(width=None if sys.stdout and sys.stdout.isatty() else 120)  # a log gets whole tables


def tell(text: str) -> None:
    """How far a measurement is; where nobody reads that any more it goes on, for its --out."""
    with suppress(OSError):
        console.print(text, highlight=False)


@dataclass
class Contender:
    """`make(**arguments)` is the generator, run in a fresh process; it must be importable by name."""

    name: str
    make: Callable[..., Iterator[dict]]
    arguments: dict[str, Any]
    keep_pages: bool = True  # whether glibc is told to keep freed pages (bertfast.machine.keep_pages)


@dataclass
class Outcome:
    """What a contender gave: its facts, one dict a turn, and why it ended early ("" if it did not)."""

    facts: dict = field(default_factory=dict)
    turns: list[dict] = field(default_factory=list)
    failed: str = ""

    def values(self, name: str = "seconds") -> list[float]:
        return [turn[name] for turn in self.turns]


def contest(contenders: list[Contender], rounds: int, threads: int, check: Callable[[dict[str, dict]], dict[str, str]],
            at_once: int = 0, shared: int = 1) -> tuple[dict[str, Outcome], bool]:
    """Outcomes by name, and whether Ctrl-C cut it short (then with the rounds that were complete).

    check: facts by name -> reasons, by name, to refuse contenders. at_once: how many are in memory together (0 = all);
    the first `shared` then run in every heat. Contenders in bf16 (by their names) are left out, with the reason, where
    a step of theirs would take minutes.
    """
    outcomes = {c.name: Outcome() for c in contenders}
    if not machine.multiplies_bf16(machine.choose_device()):
        for name in outcomes:
            outcomes[name].failed = NO_BF16 if "bf16" in name else ""
        contenders = [c for c in contenders if not outcomes[c.name].failed]
    if not contenders:
        return outcomes, False
    size = max(at_once, shared + 1) if at_once else len(contenders)
    others = max(1, size - shared)
    heats = [contenders[:size]]
    heats += [[*contenders[:shared], *contenders[i : i + others]] for i in range(size, len(contenders), others)]
    pace, paces, stopped = outcomes[contenders[0].name], [], False
    try:
        for heat in heats:
            before = len(pace.turns)
            try:
                _heat(heat, rounds, threads, check, outcomes)
            finally:
                paces.append([turn["seconds"] for turn in pace.turns[before:] if "seconds" in turn])
    except KeyboardInterrupt:
        stopped = True
        for outcome in outcomes.values():
            if not outcome.turns:
                outcome.failed = outcome.failed or "not measured: stopped"
    overall = [seconds for heat in paces for seconds in heat]
    for heat, own in zip(heats, paces) if len(paces) > 1 else ():
        for turn in (turn for c in heat[shared:] for turn in outcomes[c.name].turns) if own else ():
            turn["seconds"] *= statistics.median(overall) / statistics.median(own)
    return outcomes, stopped


def _heat(contenders, rounds, threads, check, outcomes) -> None:
    processes: dict[str, _Process] = {}
    status = console.status("") if console.is_terminal else nullcontext()
    try:
        with status as line:
            say = line.update if line else tell
            side_by_side = max(1, (os.cpu_count() or 1) // 4)  # starting is Python's work, and compiling
            for first in range(0, len(contenders), side_by_side):
                group = contenders[first : first + side_by_side]
                for contender in group:
                    say(f"starting {contender.name}")
                    processes[contender.name] = _Process(contender, threads)
                    processes[contender.name].ask()
                for contender in group:
                    facts, failed = processes[contender.name].answer()
                    outcomes[contender.name].facts = facts or outcomes[contender.name].facts
                    outcomes[contender.name].failed = outcomes[contender.name].failed or failed  # of an earlier heat
            refused = check({n: o.facts for n, o in outcomes.items() if o.facts and not o.failed})
            for name, reason in refused.items():
                outcomes[name].failed = reason
            for name, outcome in outcomes.items():
                if outcome.failed and name in processes:
                    processes.pop(name).end()
            for i in range(rounds):
                say(f"round {i + 1} of {rounds}")
                complete = {name: len(outcomes[name].turns) for name in processes}
                try:
                    for name, process in list(processes.items()):
                        process.ask()
                        turn, outcomes[name].failed = process.answer()
                        if turn is None:
                            processes.pop(name).end()
                        else:
                            outcomes[name].turns.append(turn)
                except KeyboardInterrupt:
                    for name, turns in complete.items():
                        del outcomes[name].turns[turns:]
                    raise
    finally:
        for process in processes.values():
            process.pipe.close()  # all of them first, so that they end side by side
        for process in processes.values():
            process.end()


class _Process:
    """One contender's process, and the pipe it answers on."""

    def __init__(self, contender: Contender, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        with _environment(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false"):
            self.process = context.Process(
                target=_work, args=(theirs, contender.make, contender.arguments, threads, contender.keep_pages),
                daemon=False,  # a daemon may have no children, and torch.compile wants some
            )
            self.process.start()
        theirs.close()

    def ask(self) -> None:
        """Have the generator go on to what it yields next."""
        with suppress(OSError):  # the process has ended: `answer` says so
            self.pipe.send("next")

    def answer(self) -> tuple[dict | None, str]:
        """What it yielded, or None and why there is nothing."""
        try:
            if not self.pipe.poll(PATIENCE):
                return None, f"no answer within {PATIENCE} s"
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return None, f"the process ended with exit code {self.process.exitcode}"
        return (None, answer) if isinstance(answer, str) else (answer, "")

    def end(self) -> None:
        self.pipe.close()  # which ends a process that waits; one that computes is killed
        self.process.join(5)
        self.process.kill()
        self.process.join()


def _work(pipe, make, arguments, threads, keep_pages) -> None:
    """The process's whole life: one answer a request, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(threads)
    if keep_pages:
        machine.keep_pages()
    turns = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            turns = turns or make(**arguments)
            answer = next(turns)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).strip().splitlines() or [""])[0]
            answer = f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"
            if isinstance(error, ModuleNotFoundError):
                answer = f"{message}: pip install 'bertfast[hf]'"
        pipe.send(answer)


@contextmanager
def _environment(**values: str):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def yardstick() -> Iterator[dict]:
    """A contender that measures the machine: FLOP/s of GEMMs (bertfast.machine.gemm_rate) and bytes/s of a copy."""
    device = machine.choose_device()
    source = torch.ones(MEASURED_COPY // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    yield {}
    while True:
        rates = {name: machine.gemm_rate(machine.DTYPES[name], device) for name in ("fp32", "bf16")}
        best = min(timed(target.copy_, device, source)[0] for _ in range(4))
        yield {**rates, "copy": 2 * MEASURED_COPY / best}


def timed(call: Callable[..., Any], device: torch.device, *arguments) -> tuple[float, Any]:
    """Seconds of one call, on CUDA until the device has finished, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peaks(outcome: Outcome) -> dict[str, float]:
    """The yardstick's best of all rounds: {"fp32": FLOP/s, "bf16": FLOP/s, "copy": bytes/s}."""
    names = outcome.turns[0] if outcome.turns else {}
    return {name: max(outcome.values(name)) for name in names}


def middle(values: list[float]) -> dict[str, float]:
    """Median, and the spread: the distance between the quartiles as a share of the median."""
    median = statistics.median(values)
    if len(values) < 2:
        return {"median": median, "spread": 0.0}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "spread": (high - low) / median}


def provenance(threads: int) -> dict:
    """Where a result comes from: command, commit, hardware, versions, settings of the process. Paths are shortened."""
    command = [re.sub(r"(?:^|(?<==))/(?:.*/)?(?=.)", "", a) for a in sys.argv]  # also --out=/a/path
    return {
        "command": shlex.join([Path(command[0]).name, *command[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "commit": _commit(),
        "hardware": hardware(),
        "threads": threads,
        "versions": {"bertfast": __version__, "python": platform.python_version(), **_versions()},
        "environment": {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "MALLOC_", "BERTFAST_"))},
    }


def hardware() -> dict:
    """CPU, its cores and instruction set, memory, and the GPU if there is one."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(map(str.strip, line.split(":", 1)) for line in info.partition("\n\n")[0].splitlines() if ":" in line)
    name = re.sub(r"\(\w+\)", "", facts.get("model name", platform.processor()))  # (R), (TM)
    numbers = f" (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else ""
    isa = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": name + numbers,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": isa + (" with bf16" if torch.cpu._is_avx512_bf16_supported() else ""),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
        if hasattr(os, "sysconf") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "sentence-transformers", "numpy", "cut-cross-entropy", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The source tree's commit, with "+ changes" where its code differs; None where git does not have this file."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    try:  # installed, it may lie in the tree of another project
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = ("*.py", "*.cpp", "*.h", "*.cu", "*.toml")
        status = subprocess.run([*git, "status", "--porcelain", "--", *(f":/{pattern}" for pattern in code)],
                                capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" + changes" if status.stdout.strip() else "")
