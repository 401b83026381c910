"""One pretraining step: bertfast against Hugging Face's BERT at its best, the same sequences, the same allocator.

  python benchmarks/pretrain_step.py --data PREPARED [--preset mini] [--tokens 2048] [--length 128] [--rounds 7]

Every contender takes the same packed batches (Hugging Face's are padded to the sequence length first), dropout 0.1,
both losses, clipping and fused AdamW; rounds are interleaved, medians reported, tokens/s count real tokens only. A
contender that fails is reported as such.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from bertfast import machine
from bertfast.pretrain import Run, Settings, useful_flops
from bertfast.report import Window


def padded(batch, length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """A packed batch as Hugging Face takes it: (B, length) tensors, right-padded."""
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
    return out


class HuggingFace:
    """transformers' BertForPreTraining with fused AdamW, in one of its set-ups."""

    def __init__(self, config, length: int, pad_id: int, attention: str, bf16: bool, compiled: bool):
        self.length, self.pad_id, self.bf16 = length, pad_id, bf16
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes = {name: getattr(config, name) for name in names}
        model = transformers.BertForPreTraining(transformers.BertConfig(**sizes, attn_implementation=attention))
        self.parameters = list(model.train().parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.model = torch.compile(model) if compiled else model

    def step(self, batch) -> float:
        inputs = padded(batch, self.length, self.pad_id)
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began


class Bertfast:
    def __init__(self, run: Run):
        self.run = run

    def step(self, batch) -> float:
        began = time.perf_counter()
        self.run._train_step([batch], Window()).item()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    allocator = machine.keep_pages()

    def ours(precision):
        return Run(Path(tempfile.gettempdir()), Settings(
            data=args.data, preset=args.preset, tokens=args.tokens, short_length=args.length, long_share=0.0,
            precision=precision, lr=1e-4,
        ))

    first = ours("fp32")
    loader = first._loader(first.train_data, args.length)
    batches = [loader.batch(i) for i in range(args.rounds + 3)]
    build = lambda *setup: HuggingFace(first.config, args.length, first.tokenizer.pad_id, *setup)
    contenders = {
        "bertfast fp32": lambda: Bertfast(first),
        "bertfast bf16": lambda: Bertfast(ours("bf16")),
        "HF eager fp32": lambda: build("eager", False, False),
        "HF sdpa fp32": lambda: build("sdpa", False, False),
        "HF sdpa bf16 autocast": lambda: build("sdpa", True, False),
        "HF compiled fp32": lambda: build("sdpa", False, True),
        "HF compiled bf16": lambda: build("sdpa", True, True),
    }
    ready, seconds = {}, {}
    for name, make in contenders.items():
        try:
            ready[name] = make()
            for batch in batches[:3]:  # warm-up: pages, compilation
                ready[name].step(batch)
            seconds[name] = []
        except Exception as error:
            print(f"{name}: failed ({str(error).splitlines()[0]})")
            ready.pop(name, None)
    for batch in batches[3:]:
        for name, contender in ready.items():
            seconds[name].append(contender.step(batch) / batch.n_tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("HF"))
    flops = sum(useful_flops(first.config, b) for b in batches[3:]) / sum(b.n_tokens for b in batches[3:])
    peaks = {name: machine.gemm_rate(dtype, torch.device("cpu")) for name, dtype in machine.DTYPES.items()
             if name != "fp16"}
    fill = sum(b.n_tokens for b in batches) / sum(b.n_sequences * args.length for b in batches)
    print(f"{args.preset}, {args.tokens} tokens of sequences up to {args.length} ({fill:.0%} of the padded batch), "
          f"vocabulary {first.config.vocab_size:,}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}, {allocator}; GEMM peak "
          + ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items()))
    for name, value in sorted(medians.items(), key=lambda item: item[1]):
        spread = (max(seconds[name]) - min(seconds[name])) / value
        print(f"{name:24} {1 / value:9,.0f} tokens/s   {best / value:5.2f} x the best HF   "
              f"{flops / value / 1e9:6,.0f} useful GFLOP/s   spread {spread:.0%}")
    if args.out:
        arguments = {name: value for name, value in vars(args).items() if name != "out"}
        result = {"arguments": arguments, "peaks": peaks, "seconds_per_token": seconds}
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
