"""Where the time of our step goes, kind of op by kind of op, beside the least it could take by formula.

torch.profiler's self times of steps after a warm-up; the formulas are those of roofline.py, with the best peaks of
several turns before the steps and after. "rest" is what no formula counts: autograd, indexing, copies, Python.
"""

from collections.abc import Iterable

import torch
from bertfast.benchmarks import contest, roofline
from bertfast.benchmarks.pretrain import ADAMW, LR, MAX_NORM, WARM, make_batches, model_config
from torch.profiler import ProfilerActivity, profile

from bertfast import machine
from bertfast.data.dataset import Dataset
from bertfast.files import UserError
from bertfast.model import BertForPreTraining
from bertfast.ops.dropout import step_seed
from bertfast.optim import Optimizer

STEPS = 8
TURNS = 3  # of the yardstick, before the steps and after
KINDS = {  # beginning of the profiler's name -> kind, as roofline.step_costs has it
    "aten::addmm": "linear layers", "aten::mm": "linear layers", "mkldnn::": "linear layers",
    "bertfast::gemm": "linear layers",
    "bertfast::attention": "attention", "bertfast::add_layer_norm": "add_layer_norm",
    "bertfast::bias_gelu": "bias_gelu", "bertfast::gelu_layer_norm": "gelu_layer_norm",
    "bertfast::embedding_sum": "embedding_sum", "bertfast::masked_vocab_projection": "masked_vocab_projection",
    "bertfast::grad_norm": "grad_norm and adamw_step", "bertfast::adamw_step": "grad_norm and adamw_step",
}


def kind_of(name: str) -> str:
    return next((kind for beginning, kind in KINDS.items() if name.startswith(beginning)), "rest")


def _spent(events: Iterable) -> dict[str, float]:
    """Seconds a step by kind, the most first."""
    spent: dict[str, float] = {}
    for event in events:
        spent[kind_of(event.key)] = spent.get(kind_of(event.key), 0.0) + event.self_cpu_time_total / 1e6 / STEPS
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def run(*, data: str | None, preset: str, tokens: int, length: int, precision: str, threads: int) -> dict:
    """The result as JSON's types, a row a kind. Raises UserError for settings that make no batch or no precision."""
    machine.keep_pages()
    torch.set_num_threads(threads)
    device = machine.choose_device()
    if device.type == "cuda":
        raise UserError("bench profile times what the CPU does: hide the GPU (CUDA_VISIBLE_DEVICES=)")
    precision, _ = machine.choose_precision(precision, device)
    batches = [b.to(device) for b in make_batches(data, tokens, length, 1.0, n=4)]
    vocabulary = Dataset(data).tokenizer.vocab_size if data else 30522
    config = model_config(preset, vocabulary, length)
    measuring = contest.yardstick()
    next(measuring)
    turns = [next(measuring) for _ in range(TURNS)]
    model = BertForPreTraining(config).to(device).train()
    optimizer = Optimizer(model, machine.DTYPES[precision], max_grad_norm=MAX_NORM, sink=True, **ADAMW)

    def step(i: int) -> float:
        batch = batches[i % len(batches)]
        model(batch, seed=torch.tensor([step_seed(1, i)], device=device)).loss.backward()
        return float(optimizer.step(LR))

    for i in range(WARM):
        step(i)
    # the profiler's records settle between the freed tensors, so that the next ones need other pages: touched ones
    torch.zeros(3 << 27)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for i in range(STEPS):
            step(i)
    peaks = contest.peaks(contest.Outcome({}, turns + [next(measuring) for _ in range(TURNS)]))
    here = roofline.Machine("here", peaks[precision], peaks["copy"], predicted=False)
    itemsize = machine.DTYPES[precision].itemsize
    costs = roofline.step_costs(config, batches[0].n_tokens, length, itemsize)
    rows = [{"key": f"{preset} S={length} {precision}", "contender": kind, "failed": "", "seconds": seconds,
             "bound": costs[kind].seconds(here) if kind in costs else None}
            for kind, seconds in _spent(profiler.key_averages()).items()]
    settings = {"preset": preset, "tokens": batches[0].n_tokens, "length": length, "precision": precision,
                "vocab_size": config.vocab_size}
    return {"suite": "profile", **contest.provenance(threads), "settings": settings, "machine": peaks, "rows": rows}
