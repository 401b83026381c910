"""What a GPU must show before it is believed, in a few minutes: `make gpu-check`, or `python benchmarks/gpu_check.py`.

  parity        every op in fp32, bf16 and fp16 against fp64 truth, by the rule of the parity contract; same bits twice;
                in several processes, since most of the time kernels are compiled
  training      three steps of a tiny BERT with dropout in fp32, bf16 and fp16, launched kernel by kernel and replayed
                as a CUDA graph, each twice: the same bits all four times, in fp32 the CPU engine's losses
  fine-tuning   the same of every head, launched and replayed
  speed, memory a BERT-base step in bf16, launched kernel by kernel and replayed
  ops           each in bf16 at the shapes of that step, against eager and compiled PyTorch, and Liger-Kernel and
                flash-attn where they are installed
Ends with one page and exit code 0 (all held), 1 (something did not) or 2 (no GPU here). Whole steps against
transformers: `bertfast bench pretrain --bf16 --preset base --tokens 16384` on the same machine.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from bertfast.benchmarks import contest, report
from bertfast.benchmarks import ops as bench
from bertfast.benchmarks.cases import CASES, Case, run
from bertfast.kernels import masked_vocab_projection

from bertfast import BertConfig, BertForPreTraining, PackedBatch, ops
from bertfast.finetune.batches import Sequence, pack
from bertfast.heads import (
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from bertfast.machine import DTYPES
from bertfast.optim import Optimizer
from bertfast.seq2seq import BertForPrefixLM, BertForSeq2Seq
from bertfast.step_graph import StepGraph

ULPS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
LR = 1e-3
DEVICE = "cuda"
HEADS: dict[type, Callable[[PackedBatch], dict]] = {  # what each is called with besides the batch
    BertForSequenceClassification: lambda batch: {"labels": batch.next_sentence_label},
    BertForTokenClassification: lambda batch: {"labels": batch.labels % 2},
    BertForQuestionAnswering: lambda batch: {f"{end}_positions": batch.labels[: batch.n_sequences] % batch.max_seqlen
                                             for end in ("start", "end")},
    BertForMultipleChoice: lambda batch: {"n_options": (2,) * (batch.n_sequences // 2),
                                          "labels": batch.next_sentence_label[::2]},
    BertForSeq2Seq: lambda batch: {"targets": batch, "labels": batch.input_ids.roll(-1)},
    BertForPrefixLM: lambda batch: {"prefix_lens": batch.cu_seqlens.diff() // 2},
}


def op_parity(case: Case, shape, dtype: torch.dtype, p: float) -> list[str]:
    """What does not hold for one op: a name per output that is further from the truth than eager, or not repeatable."""
    truth = run(case.eager, case, case.inputs(shape, torch.float64), p)
    tensors = {name: t.to(DEVICE) for name, t in case.inputs(shape, dtype).items()}
    eager = run(case.eager, case, tensors, p)
    first, second = run(case.fused, case, tensors, p), run(case.fused, case, tensors, p)
    faults = []
    for name in truth:
        if not torch.equal(first[name], second[name]):
            faults.append(f"{name} differs from run to run")
        if truth[name].numel():
            error = (first[name].cpu().double() - truth[name]).abs().max().item()
            allowed = (eager[name].cpu().double() - truth[name]).abs().max().item()
            allowed += ULPS[dtype] * torch.finfo(dtype).eps * truth[name].abs().max().item() + 1e-30
            if not error <= allowed:
                faults.append(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")
    return faults


def parity_checks() -> Iterator[tuple[str, tuple, str, float, bool]]:
    """Op, shape, dtype, dropout, and whether the projection must do without logits."""
    for case in CASES.values():
        for shape in case.shapes:
            for dtype in DTYPES:
                for p in (0.0, 0.1) if case.dropout else (0.0,):
                    yield case.name, shape, dtype, p, False
                if case.name == "masked_vocab_projection":
                    yield case.name, shape, dtype, 0.0, True


def parity_check(check: tuple[str, tuple, str, float, bool]) -> list[str]:
    """One of `parity_checks`: what does not hold, in words."""
    op, shape, dtype, p, without_logits = check
    limit = masked_vocab_projection.LOGITS_LIMIT
    try:
        masked_vocab_projection.LOGITS_LIMIT = 0 if without_logits else limit
        found = op_parity(CASES[op], shape, DTYPES[dtype], p)
    finally:
        masked_vocab_projection.LOGITS_LIMIT = limit
    how = " without logits" if without_logits else ""
    return [f"{op}{how} {shape} {dtype} p={p}: {fault}" for fault in found]


def check_parity() -> list[str]:
    """All of them, side by side: a process a CPU, as far as the GPU has a GiB for each."""
    checks = list(parity_checks())
    processes = min(14, len(os.sched_getaffinity(0)) - 2, torch.cuda.mem_get_info()[0] >> 30)
    with ProcessPoolExecutor(max(1, processes), get_context("spawn")) as pool:
        faults = [fault for found in pool.map(parity_check, checks) for fault in found]
    print(f"parity and repeatability of the ops: {len(checks)} cases, {len(faults)} faults")
    return faults


def packed_batch(config: BertConfig, tokens: int, length: int, seed: int, device: str) -> PackedBatch:
    """Full sequences of random words, 15 % of them to be predicted."""
    g = torch.Generator().manual_seed(seed)
    n, picked = tokens // length, length * 15 // 100
    offsets = [torch.randperm(length - 1, generator=g)[:picked].sort().values + 1 for _ in range(n)]
    ids = torch.randint(1000, config.vocab_size, (n, length), generator=g)
    sequences = [Sequence(row.numpy(), length // 2, at.numpy(), row[at].numpy()) for row, at in zip(ids, offsets)]
    return replace(pack(sequences), next_sentence_label=torch.arange(n) % 2, n_masked=n * picked).to(device)


def trained(preset: str, dtype, tokens: int, length: int, device: str, steps: int = 3, graph: bool = False):
    """Losses of a few steps, (steps,), and the model and optimiser they leave."""
    torch.manual_seed(0)
    config = BertConfig.preset(preset)
    model = BertForPreTraining(config).to(device).train()
    optimizer, losses = Optimizer(model, dtype, sink=True), []
    batches = [packed_batch(config, tokens, length, step, device) for step in range(steps)]
    step_graph = StepGraph(model, optimizer, captured=[(batches[0], {})]) if graph else None
    for step, batch in enumerate(batches):
        if step_graph:
            step_graph([(batch, {})], [step + 5], LR, (batch.n_masked, batch.n_sequences))
            out = step_graph.outputs[0]
        else:
            scale = optimizer.loss_scale
            out = model(batch, seed=torch.tensor([step + 5], device=device), mlm_scale=scale / batch.n_masked,
                        nsp_scale=scale / batch.n_sequences)  # fmt: skip
            out.loss.backward()
            optimizer.step(LR)
        losses.append((out.loss.detach() / optimizer.loss_scale).float().cpu())
    return torch.stack(losses), model, optimizer, batches, step_graph


def seconds(call, repeats: int = 20) -> float:
    """Of one call on the GPU, which finds nothing in L2 and all launches queued: the median of some."""
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        bench.flush(torch.device(DEVICE))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times[3:])[repeats // 2]


def check_training() -> list[str]:
    faults = []
    on_cpu = trained("tiny", torch.float32, 512, 64, "cpu")[0]
    for name, dtype in DTYPES.items():
        ways = (False, False, True, True)
        first, *others = (trained("tiny", dtype, 512, 64, DEVICE, graph=graph)[0] for graph in ways)
        print(f"  {name}: losses {first.tolist()}")
        for how, losses in zip(("launched again", "replayed", "replayed again"), others):
            if not torch.equal(first, losses):
                faults.append(f"training in {name}, {how}: other bits than launched the first time")
        if dtype == torch.float32 and not torch.allclose(first, on_cpu, rtol=1e-5, atol=0):
            faults.append(f"training in {name}: losses differ from the CPU's {on_cpu.tolist()} by more than 1e-5")
    return faults


def finetuned(head: type, dtype: torch.dtype, device: str, graph: bool = False) -> torch.Tensor:
    """Losses of three steps of a task's head on a tiny BERT, with dropout: (steps,)."""
    torch.manual_seed(0)
    config = BertConfig.preset("tiny")
    model = head(config).to(device).train()
    optimizer, losses = Optimizer(model, dtype, sink=True), []
    batches = [packed_batch(config, 512, 64, step, device) for step in range(3)]
    calls = [(batch, HEADS[head](batch)) for batch in batches]
    step_graph = StepGraph(model, optimizer, ("scale",), calls[:1] if graph else None)
    for step, call in enumerate(calls):
        step_graph([call], [step + 5], LR, [call[0].n_sequences])
        losses.append((step_graph.outputs[0].loss / step_graph.scale).float().cpu())
    return torch.stack(losses)


def check_finetuning() -> list[str]:
    faults = []
    for head in HEADS:
        on_cpu = finetuned(head, torch.float32, "cpu")
        for name, dtype in DTYPES.items():
            launched, replayed = (finetuned(head, dtype, DEVICE, graph) for graph in (False, True))
            if not torch.equal(launched, replayed):
                faults.append(f"{head.__name__} in {name}, replayed: other bits than launched")
            if dtype == torch.float32 and not torch.allclose(launched, on_cpu, rtol=1e-5, atol=0):
                faults.append(f"{head.__name__}: losses {launched.tolist()}, the CPU's are {on_cpu.tolist()}")
    print(f"  fine-tuning: {len(HEADS)} heads, {len(faults)} faults")
    return faults


def show_speed(graph: bool, tokens: int = 32768, length: int = 128) -> None:
    torch.cuda.reset_peak_memory_stats()
    _, model, optimizer, batches, step_graph = trained("base", torch.bfloat16, tokens, length, DEVICE, 1, graph)
    batch, scale, seed = batches[0], optimizer.loss_scale, torch.ones(1, dtype=torch.int64, device=DEVICE)

    def launched():
        model(batch, seed=seed, mlm_scale=scale / batch.n_masked).loss.backward()
        optimizer.step(LR)

    took = seconds(step_graph.graph.replay if step_graph and step_graph.graph else launched)
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"  BERT-base, bf16, {tokens} tokens of {length}, {'replayed' if graph else 'launched'}: "
          f"{took * 1e3:.1f} ms, {tokens / took:,.0f} tokens/s, {memory:.1f} GiB at most")  # fmt: skip


def show_ops(tokens: int = 32768, hidden: int = 768, words: int = 30522) -> dict:
    """A table: µs of each contender, ours as a share of what the GPU copies or multiplies."""
    masked = tokens * 15 // 100
    shapes: list[tuple[str, tuple]] = [
        ("add_layer_norm", (tokens, hidden)), ("bias_gelu", (tokens, 4 * hidden)),
        ("gelu_layer_norm", (masked, hidden)), ("embedding_sum", (tokens, hidden, words)),
        ("masked_vocab_projection", (masked, hidden, words)),
        *(("attention_full", ((length,) * (tokens // length), 0, hidden // 64, 64)) for length in (128, 512)),
    ]
    rows = []
    for op, shape in shapes:
        torch._dynamo.reset()
        calls = {"bertfast": CASES[op].fused, "eager": bench.BEST[op],
                 "compiled": torch.compile(bench.BEST[op], dynamic=False), **bench.peers(op)}
        rows += bench.measure(op, shape, "bf16", calls, rounds=5)
    result = {"suite": "ops", **contest.provenance(torch.get_num_threads()), "settings": {}, "rows": rows}
    report.show(result)
    return result


def as_memory_allows(show: Callable, *arguments):
    """What it returns, or None and a line where the GPU's memory is too small for it."""
    try:
        return show(*arguments)
    except torch.OutOfMemoryError as error:
        print(f"  {show.__name__}:", str(error).partition("\n")[0])
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the ops' table goes, as a result of `bertfast bench`")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: no GPU was found here; nothing was checked (torch.cuda.is_available() is False)")
        return 2
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for name, where in ops.backends().items():
        print(f"  {name}: {where['cuda']}")
    faults = check_parity()
    print("training:")
    faults += check_training() + check_finetuning()
    print("\n".join(faults) or "all of it held")
    print("speed and memory:")
    for graph in (False, True):
        as_memory_allows(show_speed, graph)
    result = as_memory_allows(show_ops)
    if options.out and result:
        report.write(result, options.out)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
