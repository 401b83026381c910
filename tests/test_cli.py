"""The command line: what is given to a command arrives at the functions behind it."""

import errno
import inspect
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from bertfast.benchmarks import commands
from typer.models import OptionInfo
from typer.testing import CliRunner

from bertfast import cli, machine
from bertfast.files import UserError

BENCH = "benchmarks.commands:_finish"
COMMANDS = {  # command: (arguments without which it does not start, the functions behind it, the last one called last)
    "prepare": ("a.txt --out set", ["data.prepare:prepare"]),
    "pretrain": ("--out run --data set", ["pretrain:start"]),
    "finetune": ("--task qa --model m --train t --out run", ["finetune.train:finetune"]),
    "predict": ("--model m --input i --out o",
                ["finetune.predict:Predictor.__init__", "finetune.predict:predict_file"]),
    "fill-mask": ("[MASK] --model m", ["fill_mask:FillMask.__init__", "fill_mask:FillMask.__call__"]),
    "export": ("--model m --out o", ["checkpoint:export"]),
    "bench pretrain": ("", ["benchmarks.pretrain:run", BENCH]),
    "bench memory": ("", ["benchmarks.pretrain:run", BENCH]),
    "bench ops": ("", ["benchmarks.ops:run", BENCH]),
    "bench inference": ("--model m --text t", ["benchmarks.inference:run", BENCH]),
    "bench finetune": ("--task qa --model m --train t", ["benchmarks.finetune:run", BENCH]),
    "bench trainer": ("--model m --train t --dev d", ["benchmarks.trainer:run", BENCH]),
    "bench quality": ("--data set", ["benchmarks.quality:run", BENCH]),
    "bench job": ("run", ["benchmarks.job:run", BENCH]),
    "bench roofline": ("", ["benchmarks.roofline:bounds", BENCH]),
    "bench profile": ("", ["benchmarks.step_profile:run", BENCH]),
    "bench moves": ("", ["benchmarks.moves:run", BENCH]),
    "bench tune": ("", ["benchmarks.tune:tune"]),
    "bench report": ("", ["benchmarks.report:update"]),
}
RENAMED = {  # where what arrives has another name than the option, in one command or in all
    ("pretrain", "out"): "folder", ("finetune", "out"): "folder", ("predict", "model"): "folder", "input": "source",
    ("fill-mask", "model"): "folder", ("export", "model"): "source", ("bench quality", "precision"): "precisions",
    "peer": "peers", "op": "only", "batch": "batches", "head_size": "head_sizes", "hidden_size": "hidden_sizes",
    "readme": "readmes",
}
COMMAND_LINE = typer.main.get_command(cli.app)
VALUES = {"preset": "tiny", "start": "normal", "optimizer": "lamb", "precision": "bf16", "dtype": "bf16",
          "op": "bias_gelu", "peer": "HF eager fp32", "readme": __file__}  # where not every value will do


def options() -> Iterator[tuple[str, str, Any, Any]]:
    """(command, name, type, default) of all there are."""
    for prefix, app in (("", cli.app), ("bench ", commands.bench)):
        for command in app.registered_commands:
            for name, parameter in inspect.signature(command.callback).parameters.items():
                kind, *more = get_args(parameter.annotation) or (parameter.annotation,)
                if any(isinstance(m, OptionInfo) for m in more):
                    yield prefix + command.callback.__name__.replace("_", "-"), name, kind, parameter.default


@pytest.mark.parametrize("command, name, kind, default", list(options()))
def test_every_option_and_its_default_arrive(command: str, name: str, kind: Any, default: Any,
                                             monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if command == "bench tune":
        pytest.importorskip("triton")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    needed, behind = COMMANDS[command]
    found: dict[str, Any] = {}

    class Arrived(Exception):
        pass

    def noting(function, last: bool):
        def noted(*args, **kwargs):
            for key, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
                found.update(asdict(value) if is_dataclass(value) else {key: value})
            if last:
                raise Arrived
            return None if function.__name__ == "__init__" else {}
        return noted

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "keep_pages", lambda: "")  # of this process
    monkeypatch.setattr(torch, "set_num_threads", lambda n: found.update(threads=n))
    monkeypatch.setattr(machine, "gemm_rate", lambda *_: 1e9)
    monkeypatch.setattr("bertfast.benchmarks.report.results", lambda folder: {})
    for place in behind:
        module, _, path = place.partition(":")
        *owner, attribute = path.split(".")
        holder = import_module(f"bertfast.{module}")
        holder = getattr(holder, owner[0]) if owner else holder
        monkeypatch.setattr(holder, attribute, noting(getattr(holder, attribute), place == behind[-1]))

    def arriving(*arguments: str) -> Any:
        found.clear()
        with pytest.raises(Arrived):
            COMMAND_LINE.main([*command.split(), *needed.split(), *arguments], standalone_mode=False)
        there = found[RENAMED.get((command, name), RENAMED.get(name, name))]
        return [str(x) for x in there] if isinstance(there, list) else str(there)

    option = "--" + name.replace("_", "-")
    if kind is bool:
        arguments, value = [option if not default else option.replace("--", "--no-", 1)], not default
    else:
        number = default if isinstance(default, (int, float)) else 0
        other = {"int": number + 1 if number else 128, "float": number / 2 + 0.125}
        value = VALUES.get(name) or next((v for type_, v in other.items() if type_ in str(kind)), f"a-{name}")
        arguments = [option, str(value)]
    assert arriving(*arguments) in (str(value), [str(value)])
    if default not in (None, inspect.Parameter.empty):
        assert arriving() == str(default)


@pytest.mark.parametrize("line", [
    "prepare a.txt --out set --workers 1025", "bench ops --threads 4097", "bench ops --rounds 1000001",
    "bench memory --rounds 1000001", "bench roofline --tokens 134217729", "bench roofline --length 65536",
    "bench finetune --task qa --model m --train t --window inf"])
def test_numbers_beyond_all_machines_are_refused(line: str) -> None:
    done = CliRunner().invoke(cli.app, line.split())
    assert done.exit_code == 2 and "Invalid value for" in done.output


def test_the_precision_is_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    rates = {torch.float32: 2e11}
    monkeypatch.setattr(machine, "gemm_rate", lambda dtype, device: rates[dtype])
    for has_bf16, rate, expected in ((True, 3e11, "bf16"), (True, 1e11, "fp32"), (False, 3e11, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        rates[torch.bfloat16] = rate
        assert machine.choose_precision("auto", cpu)[0] == expected
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **_: has_bf16)
        assert machine.choose_precision("auto", gpu)[0] == expected
    with pytest.raises(UserError, match="fp16 trains on GPUs only"):
        machine.choose_precision("fp16", cpu)


@pytest.mark.parametrize(("capability", "has_bf16", "expected"), [
    ("AVX2", False, True), ("AVX512", False, False), ("AVX512", True, True)])
def test_which_cpus_multiply_bf16(capability: str, has_bf16: bool, expected: bool,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN has it: not with AVX-512 alone, which takes five times as long as for fp32."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    for there in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
        assert machine.multiplies_bf16(torch.device("cpu")) == (expected and there)
    assert machine.multiplies_bf16(torch.device("cuda"))


def test_a_rate_is_flops_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "perf_counter", iter(range(99)).__next__)  # every look at it takes a second
    monkeypatch.setattr(torch, "mm", lambda a, b, out: None)
    assert machine.gemm_rate(torch.float32, torch.device("cpu")) == 2 * 1024**3


def test_output_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")  # as of LC_ALL=de_DE.iso88591, or of a pipe on Windows
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.argv", ["bertfast", "finetune", "--help"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out.flush()
    assert rb"pearson, \u2026" in out.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("size", "code", "said"), [
    ("", 0, ""), ("many", 2, "bertfast: WORLD_SIZE='many' is no number of processes\n")])
def test_a_number_of_processes_that_is_none(size: str, code: int, said: str) -> None:
    program = [sys.executable, "-m", "bertfast", "bench", "report", "--help"]
    done = subprocess.run(program, capture_output=True, text=True,
                          env={**os.environ, "RANK": "0", "WORLD_SIZE": size})
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_that_cannot_be_written_is_one_line() -> None:
    program = [sys.executable, "-m", "bertfast", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "bertfast: cannot write the output: No space left on device\n")


def test_a_broken_pipe_is_one_line(tmp_path: Path) -> None:
    for show in ('report.note("x")', 'print("x", flush=True)'):
        program = f"""
from bertfast import cli, fill_mask, report
def told(_):
    while True:
        {show}
fill_mask.FillMask = told
cli.main()"""
        run = subprocess.Popen([sys.executable, "-c", program, "fill-mask", "[MASK]", "--model", "m"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert run.stdout and run.stderr and run.stdout.readline() == "x\n"
        run.stdout.close()  # as head does
        assert run.stderr.read() == "bertfast: cannot write the output: Broken pipe\n" and run.wait(60) == 2


@pytest.mark.parametrize(("error", "said"), [
    (PermissionError(errno.EACCES, "Permission denied", "secret/config.json"), "secret/config.json: Permission denied"),
    (OSError(errno.ENAMETOOLONG, "File name too long", 300 * "a"), f"{80 * 'a'}: File name too long"),
    (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in []"),
     "No usable temporary directory found in []"),
    (MemoryError(), "out of memory; fewer tokens or a smaller model need less: MemoryError"),
])
def test_what_the_machine_refuses_is_one_line(error: Exception, said: str, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture) -> None:
    def refuse(_: str) -> None:
        raise error

    monkeypatch.setattr("bertfast.fill_mask.FillMask", refuse)
    monkeypatch.setattr("sys.argv", ["bertfast", "fill-mask", "[MASK]", "--model", "secret"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == f"bertfast: {said}\n"


STOPPED_IN = {
    "an import": """
class Finder:
    def find_spec(name, *_):
        if name == "bertfast.fill_mask":
            try:
                stop()
            except BaseException:
                os.abort()  # as C++ does
sys.meta_path.insert(0, Finder)""",
    "a call": """
from bertfast import fill_mask
fill_mask.FillMask = lambda _: stop()""",
    "an import while a file is written": """
import time
from bertfast import files, fill_mask
class Finder:
    def find_spec(name, *_):
        if name == "late":
            stop()
sys.meta_path.insert(0, Finder)
def write(_):
    with files.atomic_path("file"):
        try:
            import late
        except ImportError:
            time.sleep(600)
fill_mask.FillMask = write""",
}


@pytest.mark.parametrize("place", STOPPED_IN)
@pytest.mark.parametrize("number, said", [(signal.SIGINT, "bertfast: interrupted\n"), (signal.SIGTERM, "")])
def test_a_stop_at_any_time_is_one_line(number: signal.Signals, said: str, place: str, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from bertfast import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell would ignore it
stop = lambda: signal.raise_signal({int(number)})
{STOPPED_IN[place]}
cli.main()"""
    done = subprocess.run([sys.executable, "-c", program, "fill-mask", "[MASK]", "--model", "m"], capture_output=True,
                          text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, said)
    assert not list(tmp_path.iterdir())
