"""What `make gpu-check` does on a GPU, on a CPU: that its checks hold, and that they find what they are for."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from bertfast.benchmarks import gpu_check
from bertfast.benchmarks.cases import CASES
from bertfast.kernels import masked_vocab_projection as projection

from bertfast.step_graph import StepGraph

CASE, SHAPE = CASES["add_layer_norm"], (37, 128)


class Replayed(StepGraph):
    def capture(self):
        self.warm_up()
        return SimpleNamespace(replay=self.step)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "StepGraph", Replayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_holds_and_a_fault_is_found(on_cpu, dtype):
    assert gpu_check.op_parity(CASE, SHAPE, dtype, 0.1) == []
    calls = iter(range(9))
    wrong = dataclasses.replace(CASE, fused=lambda t, p: CASE.fused(t, p) * 1.1)
    assert [fault.split(" is off")[0] for fault in gpu_check.op_parity(wrong, SHAPE, dtype, 0.1)][0] == "y"
    restless = dataclasses.replace(CASE, fused=lambda t, p: CASE.fused(t, p) * (1 + next(calls) * 2**-6))
    assert "y differs from run to run" in gpu_check.op_parity(restless, SHAPE, dtype, 0.1)


def test_training_holds_and_a_fault_is_found(on_cpu, monkeypatch):
    with monkeypatch.context() as only:  # the others are slow on a CPU
        only.setattr(gpu_check, "DTYPES", {"fp32": torch.float32})
        assert gpu_check.check_training() == []
    calls = iter(range(99))
    monkeypatch.setattr(gpu_check, "trained", lambda *_, **__: (torch.ones(3) + next(calls) * 1e-4,))
    faults = gpu_check.check_training()
    assert [f.partition(":")[0] for f in faults if "other bits" in f] == [
        f"training in {name}, {way}" for name in gpu_check.DTYPES
        for way in ("launched again", "replayed", "replayed again")
    ]
    assert len(faults) == 10 and "training in fp32: losses differ from the CPU's" in " ".join(faults)


def test_finetuning_holds_and_a_fault_is_found(on_cpu, monkeypatch):
    with monkeypatch.context() as only:
        only.setattr(gpu_check, "DTYPES", {"fp32": torch.float32})
        assert gpu_check.check_finetuning() == []
    calls = iter(range(99))
    monkeypatch.setattr(gpu_check, "finetuned", lambda *_: torch.ones(3) + next(calls) * 1e-4)
    faults = gpu_check.check_finetuning()
    assert sum("replayed: other bits" in fault for fault in faults) == 18
    assert sum("the CPU's are" in fault for fault in faults) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no GPU was found here; nothing was checked" in capsys.readouterr().out


def test_the_parity_checks_cover_every_case_and_both_ways_of_the_projection(on_cpu, monkeypatch):
    checks = list(gpu_check.parity_checks())
    assert {check[0] for check in checks} == set(CASES) and len(checks) == len(set(checks))
    assert {check[4] for check in checks if check[0] == "masked_vocab_projection"} == {False, True}
    ways = []
    monkeypatch.setattr(gpu_check, "op_parity", lambda *_: ways.append(projection.LOGITS_LIMIT) or ["y is off"])
    for without_logits in (False, True):
        check = "masked_vocab_projection", (1, 64, 333), "bf16", 0.0, without_logits
        assert gpu_check.parity_check(check)[0].endswith("(1, 64, 333) bf16 p=0.0: y is off")
    assert ways == [projection.LOGITS_LIMIT, 0] and projection.LOGITS_LIMIT > 0


@pytest.mark.parametrize(("cpus", "gib", "processes"), [(224, 80, 14), (224, 6, 6), (8, 80, 6), (1, 0, 1)])
def test_parity_runs_in_as_many_processes_as_the_gpu_has_memory_for(cpus, gib, processes, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_check, "ProcessPoolExecutor", lambda n, _: asked.append(n) or ThreadPoolExecutor(1))
    monkeypatch.setattr(gpu_check, "parity_check", lambda check: [])
    monkeypatch.setattr(gpu_check.os, "sched_getaffinity", lambda process: range(cpus))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib << 30, 0))
    assert gpu_check.check_parity() == [] and asked == [processes]


def test_what_the_memory_is_too_small_for_is_a_line_after_the_faults(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    for name, value in (("is_available", True), ("get_device_capability", (8, 6)), ("get_device_name", "A GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, faults in (("check_parity", ["y is off"]), ("check_training", []), ("check_finetuning", [])):
        monkeypatch.setattr(gpu_check, name, lambda faults=faults: faults)
    monkeypatch.setattr(gpu_check, "show_speed", too_large)
    monkeypatch.setattr(gpu_check, "show_ops", too_large)
    assert gpu_check.main([]) == 1
    *_, fault, title, launched, replayed, table = capsys.readouterr().out.splitlines()
    assert (fault, title) == ("y is off", "speed and memory:")
    assert launched == replayed == table == "  too_large: CUDA out of memory. Tried to allocate 2 GiB."
