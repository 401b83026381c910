"""One pretraining step: bertfast against Hugging Face's BERT at its best and a plain-PyTorch model equal to ours.

All take the same sequences, start from the same weights, train with AdamW (ours spares biases and LayerNorm the decay,
which costs nobody time), the same clipping and learning rate, both losses, dropout 0.1. Before the clock starts, each
makes two optimiser steps with dropout off: both losses must agree to 1e-3 and the gradient norms to 1 % with Hugging
Face's eager fp32, which covers forward, backward and update.
tokens/s counts real tokens only. Useful FLOPs are bertfast.model.useful_flops, the share that of the GEMM rate which
the same run measured in the contender's own dtype.
"""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # torch's optimisers load it, 140 MiB: before memory is read
import torch.nn.functional as F
from bertfast.benchmarks import contest
from bertfast.benchmarks.contest import Contender, Outcome, timed
from safetensors.torch import load_file

from bertfast import machine
from bertfast.batch import PackedBatch
from bertfast.config import BertConfig
from bertfast.data.dataset import Dataset
from bertfast.files import UserError
from bertfast.finetune.batches import Sequence, pack
from bertfast.model import BertForPreTraining, useful_flops
from bertfast.ops.dropout import step_seed
from bertfast.optim import Optimizer
from bertfast.step_graph import Call, StepGraph, replayable

ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}
LR, MAX_NORM = 5e-4, 1.0
WARM, N_BATCHES = 3, 16
# relative to the reference, with dropout off; bf16 rounds to 4e-3, and the plain model keeps its weights in it
LOSS_AGREES, NORM_AGREES = {"fp32": 1e-3, "bf16": 2e-3}, 1e-2
REFERENCE = "HF eager fp32"
SETUPS = {  # of transformers
    name: {"attention": attention, "bf16": bf16, "compiled": compiled}
    for name, attention, bf16, compiled in (
        (REFERENCE, "eager", False, False), ("HF sdpa fp32", "sdpa", False, False),
        ("HF sdpa bf16 autocast", "sdpa", True, False), ("HF compiled fp32", "sdpa", False, True),
        ("HF compiled bf16 autocast", "sdpa", True, True),
    )
}


# ---- what they train on


def model_config(preset: str, vocab_size: int, length: int) -> BertConfig:
    """Weights twice the usual size: attention is not flat, so that a wrong one shows in the loss.

    Raises UserError for an unknown preset, and for sequences that it has no positions for.
    """
    config = BertConfig.preset(preset, vocab_size=vocab_size, initializer_range=0.04)
    if length > config.max_position_embeddings:
        raise UserError(f"sequences of {length} tokens, but the model has {config.max_position_embeddings} positions")
    return config


def make_batches(data: str | None, tokens: int, length: int, fill: float, n: int = N_BATCHES,
                 vocab_size: int = 30522) -> list[PackedBatch]:
    """n packed batches of about `tokens` real tokens, so many that a padded batch would be `fill` full.

    Text of a prepared set, or without one ids of Zipf's frequencies. Lengths are spread evenly around fill * length,
    the longest is `length`; masked 15 %, and as many empty slots as bertfast.data.dataset.Loader leaves. Raises
    UserError for a fill out of range, and a set of fewer tokens than one sequence.
    """
    if not 0.5 <= fill <= 1.0:
        raise UserError(f"a fill of {fill:.0%} is out of range: 50 % to 100 %")
    generator = np.random.default_rng(0)
    if data:
        text = Dataset(data)
        ids, tokenizer = text.tokens, text.tokenizer
        if len(ids) <= length:
            raise UserError(f"{data} holds {len(ids)} tokens, too few for a sequence of {length}")
        special = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
    else:
        special = 101, 102, 103
        frequencies = 1 / np.arange(3, vocab_size - 1000 + 3)
        ids = 1000 + generator.choice(len(frequencies), 1 << 20, p=frequencies / frequencies.sum())
    B = max(1, round(tokens / (fill * length)))
    lengths = np.linspace((2 * fill - 1) * length, length, B).round().astype(int).clip(min=8)
    return [_batch(ids, generator.permutation(lengths), length, generator, special) for _ in range(n)]


def _batch(ids, lengths, longest, generator, special) -> PackedBatch:
    """Sequences [CLS] A [SEP] B [SEP] from random places of `ids`, and the empty slots that a Loader's batch has."""
    cls, sep, mask = special
    sequences, pairs = [], []
    for size in lengths.tolist():
        begin, first = generator.integers(0, len(ids) - size), size // 2
        words = np.array(ids[begin : begin + size], np.int64)
        words[[0, first, -1]] = cls, sep, sep
        candidates = [i for i in range(1, size - 1) if i != first]
        chosen = np.sort(generator.choice(candidates, max(1, round(0.15 * len(candidates))), replace=False))
        labels = words[chosen]
        words[chosen] = mask
        sequences.append(Sequence(words, first + 1, chosen, labels))
        pairs.append(int(generator.integers(0, 2)))
    batch = pack(sequences)
    B = int(np.ceil(1.2 * len(lengths))) + 2
    P = int(np.ceil(0.15 * batch.n_tokens)) + B
    room = lambda t, size, value=0: F.pad(t, (0, size - len(t)), value=value)
    return replace(
        batch, max_seqlen=int(longest), cu_seqlens=room(batch.cu_seqlens, B + 1, batch.n_tokens),
        cu_seqlens_read=room(batch.cu_seqlens_read, B + 1, len(batch.read_rows)),
        read_rows=room(batch.read_rows, P + B), cls_index=room(batch.cls_index, B),
        mask_index=room(batch.mask_index, P), labels=room(batch.labels, P, -100),
        next_sentence_label=room(torch.tensor(pairs), B, -100), n_masked=len(batch.labels),
    )


def padded(batch: PackedBatch, length: int, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A packed batch as Hugging Face takes it: (B, length) tensors, right-padded.

    Without a mask where nothing is padded: a compiled model would compute with one of ones.
    """
    n, bounds = batch.n_sequences, batch.cu_seqlens.tolist()
    shape = (n, length)
    out = {
        "input_ids": torch.full(shape, pad_id), "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, -100),
        "next_sentence_label": batch.next_sentence_label[:n],
    }
    flat = torch.full((len(batch.input_ids),), -100)
    used = batch.labels != -100
    flat[batch.read_rows[batch.mask_index[used]]] = batch.labels[used]
    for b in range(n):
        rows, columns = slice(bounds[b], bounds[b + 1]), slice(0, bounds[b + 1] - bounds[b])
        out["input_ids"][b, columns] = batch.input_ids[rows]
        out["token_type_ids"][b, columns] = batch.token_type_ids[rows]
        out["attention_mask"][b, columns] = 1
        out["labels"][b, columns] = flat[rows]
    if out["attention_mask"].all():
        del out["attention_mask"]
    return out


# ---- the contenders: generators, each in its own process


def bertfast(checkpoint: str, batches: dict, precision: str, replayed: bool = True, **turns) -> Iterator[dict]:
    """Our training step, as bertfast.pretrain makes it; a replay allocates nothing, so that memory needs launches."""
    device, before = machine.choose_device(), _resident()
    model = BertForPreTraining.from_pretrained(checkpoint).to(device)
    replayed = replayed and replayable(device, model.config) and not turns.get("memory")
    optimizer = Optimizer(model, machine.DTYPES[precision], max_grad_norm=MAX_NORM, sink=True, **ADAMW)
    packed = [batch.to(device) for batch in make_batches(**batches)]
    counts = [[b.n_masked, int((b.next_sentence_label >= 0).sum())] for b in packed]
    calls: list[list[Call]] = [[(batch, {})] for batch in packed]
    graphs: dict[bool, StepGraph] = {}  # with dropout, and without

    def step(i):
        if model.training not in graphs:
            captured = calls[i] if replayed and model.training else None
            graphs[model.training] = StepGraph(model, optimizer, captured=captured)
        graph = graphs[model.training]
        norm = graph(calls[i], [step_seed(1, i)], LR, counts[i])
        return graph.outputs[0].loss.detach(), norm

    yield from _train(model, step, packed, before, **turns, state=14 if precision == "bf16" else 16)


def hugging_face(checkpoint: str, batches: dict, attention: str, bf16: bool, compiled: bool,
                 fused: bool = True, **turns) -> Iterator[dict]:
    """transformers' BertForPreTraining on the padded batch."""
    from transformers import BertForPreTraining as TheirBert  # its module is loaded before memory is read

    device, before = machine.choose_device(), _resident()
    model = TheirBert.from_pretrained(checkpoint, attn_implementation=attention).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=fused, **ADAMW)
    call = torch.compile(model) if compiled else model
    packed = make_batches(**batches)
    inputs = [{k: t.to(device) for k, t in padded(b, batches["length"]).items()} for b in packed]

    def step(i):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = call(**inputs[i]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), norm

    yield from _train(model, step, packed, before, **turns)


def plain_torch(checkpoint: str, batches: dict, precision: str, compiled: bool, **turns) -> Iterator[dict]:
    """The plain-PyTorch model equal to ours (bertfast.benchmarks.plain)."""
    from bertfast.benchmarks import plain

    device, before = machine.choose_device(), _resident()
    model = plain.PlainBert(BertConfig.from_file(Path(checkpoint) / "config.json"))
    model = model.load(load_file(Path(checkpoint) / "model.safetensors")).to(device, machine.DTYPES[precision])
    optimizer = plain.AdamW(list(model.parameters()), lr=LR, **ADAMW)
    call = torch.compile(model) if compiled else model
    packed = make_batches(**batches)
    inputs = [[x.to(device) if isinstance(x, torch.Tensor) else x for x in plain.inputs(b)] for b in packed]

    def step(i):
        loss = call(*inputs[i])
        loss.backward()
        return loss.detach(), optimizer.step(MAX_NORM)

    yield from _train(model, step, packed, before, **turns, state=20 if precision == "bf16" else 16)


def _train(model, step: Callable, batches: list[PackedBatch], before: int, turn_steps: int,
           memory: bool = False, state: int = 16) -> Iterator[dict]:
    """Two steps with dropout off, a warm-up, then turns: a step to warm the caches again, and the timed ones.

    memory: turns are one step each after freed pages went back to the system; they yield the step's peak. state: bytes
    of parameter, gradient and optimiser an element.
    """
    device = next(model.parameters()).device
    model.eval()
    checks = [[float(value) for value in step(i)] for i in range(2)]
    model.train()
    for i in range(2, 2 + WARM):
        step(i)
    parameters = sum(p.numel() for p in model.parameters())
    yield {"losses": [loss for loss, _ in checks], "norms": [norm for _, norm in checks], "parameters": parameters}
    done = 2 + WARM
    while True:
        if memory:
            _reset_peak()
            step(done % len(batches))
            yield {"peak": _peak() - before, "activations": _peak() - before - state * parameters}
        else:
            step(done % len(batches))
            chosen = [(done + 1 + j) % len(batches) for j in range(turn_steps)]
            seconds, (loss, _) = timed(lambda chosen=chosen: [step(i) for i in chosen][-1], device)
            yield {"seconds": seconds / sum(batches[i].n_tokens for i in chosen), "loss": float(loss)}
            done += turn_steps
        done += 1


# ---- memory, as the system sees it (Linux), or the GPU's allocator


def _resident() -> int:
    """Bytes of this process in memory now; on CUDA nothing, since its allocator counts from zero."""
    return 0 if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name + ":"))) * 1024


# ---- the suites


def contenders(quick: bool, arguments: dict, memory: bool = False, bf16: bool = False) -> list[Contender]:
    """All set-ups; `quick` leaves out those that compile, `bf16` those in fp32 but the reference."""
    entries = {
        **{name: (hugging_face, setup) for name, setup in SETUPS.items()},
        "bertfast fp32": (bertfast, {"precision": "fp32"}),
        "bertfast bf16": (bertfast, {"precision": "bf16"}),
        "plain fp32": (plain_torch, {"precision": "fp32", "compiled": False}),
        "plain bf16": (plain_torch, {"precision": "bf16", "compiled": False}),
        "plain compiled fp32": (plain_torch, {"precision": "fp32", "compiled": True}),
        "plain compiled bf16": (plain_torch, {"precision": "bf16", "compiled": True}),
    }
    if not memory:  # and two with nothing else chosen than the attention
        entries["HF as it comes"] = hugging_face, {**SETUPS["HF sdpa fp32"], "fused": False}
        entries["HF eager as it comes"] = hugging_face, {**SETUPS[REFERENCE], "fused": False}
    return [
        Contender(name, make, {**arguments, **more}, keep_pages=not memory and not name.endswith("as it comes"))
        for name, (make, more) in entries.items()
        if not (quick and "compiled" in name) and (not bf16 or "bf16" in name or name == REFERENCE)
    ]


def agreement(facts: dict[str, dict], reference: str = "") -> dict[str, str]:
    """Whose losses or gradient norms, dropout off, are not the reference's: {name: why}.

    reference: who is right; by default transformers' eager model, where that failed another of theirs, or a plain one.
    """
    facts = {name: found for name, found in facts.items() if "losses" in found}
    others = [name for family in ("HF", "plain") for name in facts if name.startswith(family) and "fp32" in name]
    reference = reference or (REFERENCE if REFERENCE in facts else next(iter(others), ""))
    refused: dict[str, str] = {}
    if reference not in facts:
        return dict.fromkeys(facts, "refused: every reference in fp32 failed, and nothing else says what is right")
    for name, found in facts.items():
        for kind, allowed in (("losses", LOSS_AGREES["bf16" if "bf16" in name else "fp32"]), ("norms", NORM_AGREES)):
            for i, (value, wanted) in enumerate(zip(found.get(kind, []), facts[reference].get(kind, []))):
                if not abs(value - wanted) <= allowed * abs(wanted):
                    refused.setdefault(name, f"refused: {kind} of step {i + 1} with dropout off: {value:.5g}, "
                                             f"{reference}'s {wanted:.5g}")
    return refused


def run(suite: str, *, data: str | None, preset: str, tokens: int, length: int, fill: float, rounds: int,
        threads: int, quick: bool, at_once: int = 0, bf16: bool = False) -> dict:
    """`pretrain` or `memory`: the result as JSON's types. Raises UserError for settings that make no batch."""
    memory = suite == "memory"
    vocabulary = Dataset(data).tokenizer.vocab_size if data else 30522
    batches = {"data": data, "tokens": tokens, "length": length, "fill": fill, "vocab_size": vocabulary}
    sample = make_batches(**batches, n=1)[0]
    config = model_config(preset, vocabulary, length)
    steps = 8 if torch.cuda.is_available() else max(1, min(4, 4096 // sample.n_tokens))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertForPreTraining(config).save_pretrained(folder)
        arguments = {"checkpoint": folder, "batches": batches, "turn_steps": steps, "memory": memory}
        entrants = contenders(quick, arguments, memory, bf16)
        entrants.insert(1, Contender("machine", contest.yardstick, {}))
        outcomes, stopped = contest.contest(entrants, rounds, threads, agreement, at_once, shared=2)
    peaks = contest.peaks(outcomes.pop("machine"))
    flops = useful_flops(config, sample) / sample.n_tokens
    settings = {"preset": preset, "tokens": sample.n_tokens, "sequences": sample.n_sequences, "length": length,
                "fill": round(sample.n_tokens / (sample.n_sequences * length), 3), "vocab_size": vocabulary,
                "dropout": 0.1, "text": "prepared" if data else "zipf", "rounds": rounds, "steps_a_turn": steps}
    rows = [_row(name, outcome, flops, peaks, memory, settings) for name, outcome in outcomes.items()]
    return {"suite": suite, **contest.provenance(threads), "settings": settings, "machine": peaks,
            "stopped_early": stopped, "rows": rows}


def _row(name: str, outcome: Outcome, flops: float, peaks: dict, memory: bool, settings: dict) -> dict:
    dtype = "bf16" if "bf16" in name else "fp32"
    where = f"{settings['preset']} S={settings['length']} fill={round(100 * settings['fill'])} %"
    row = {"key": where, "contender": name, "dtype": dtype, "failed": outcome.failed, **outcome.facts}
    if outcome.failed or not outcome.turns:
        return row
    if memory:
        peak, activations = (min(outcome.values(n)) for n in ("peak", "activations"))
        return {**row, "peak_bytes": peak, "activation_bytes": activations}
    row |= {"samples": outcome.values(), **contest.middle(outcome.values()), "loss": outcome.turns[-1]["loss"]}
    row |= {"tokens_per_second": 1 / row["median"], "flops_per_second": flops / row["median"]}
    if dtype in peaks:
        row["share"] = row["flops_per_second"] / peaks[dtype]
    return row
