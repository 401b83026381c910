"""What bertfast.patch gives to those who change one line: embeddings, and fine-tuning with transformers' Trainer.

  python benchmarks/patch_speed.py embeddings --model DIR --sentences FILE [--count 2000]
  python benchmarks/patch_speed.py trainer --model DIR --train FILE.tsv --dev FILE.tsv [--count 10000] [--dropout 0.1]

FILE.tsv: a header, then sentence, tab, label. The sentences of `embeddings` are the first column of its FILE. Original
and patched runs are interleaved, medians reported; bf16 embeddings are those of model.bfloat16(), bf16 training is the
Trainer's own. Losses of the original and patched runs are compared step by step.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

import bertfast
from bertfast import machine


def read_rows(path: str, count: int | None = None) -> list[list[str]]:
    rows = [line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]]
    random.Random(0).shuffle(rows)
    return rows[:count]


def embeddings(options) -> None:
    from sentence_transformers import SentenceTransformer

    sentences = [row[0] for row in read_rows(options.sentences, options.count)]
    models = {}
    for name in ("original fp32", "patched fp32", "original bf16", "patched bf16"):
        models[name] = SentenceTransformer(options.model, device="cpu")
        if "bf16" in name:
            models[name].bfloat16()
        if "patched" in name:
            bertfast.patch(models[name])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    found = {}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, model in models.items():
            began = time.perf_counter()
            found[name] = model.encode(sentences, batch_size=options.batch_size, convert_to_tensor=True).float()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    base, truth = statistics.median(seconds["original fp32"]), found["original fp32"]
    print(f"{'':14s} {'sentences/s':>11s} {'x original':>10s} {'spread':>7s} {'max deviation':>13s} {'cosine':>9s}")
    for name, times in seconds.items():
        median = statistics.median(times)
        cosine = torch.nn.functional.cosine_similarity(found[name], truth).min()
        print(f"{name:14s} {len(sentences) / median:11,.0f} {base / median:10.2f} "
              f"{(max(times) - min(times)) / median:7.0%} {(found[name] - truth).abs().max():13.1e} {cosine:9.6f}")


class Losses(transformers.TrainerCallback):
    """The loss of every step."""

    def __init__(self):
        self.curve: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.curve.append(float(logs["loss"]))


def trainer(options) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)

    def examples(path, count=None):
        return [{**tokenizer(text, truncation=True, max_length=128), "labels": int(label)}
                for text, label in read_rows(path, count)]

    train, dev = examples(options.train, options.count), examples(options.dev)
    first: list[float] = []
    print(f"{'':14s} {'samples/s':>9s} {'accuracy':>8s} {'last loss':>9s} {'step deviation':>14s}")
    for name in options.only.split(","):
        transformers.set_seed(0)
        model = transformers.BertForSequenceClassification.from_pretrained(
            options.model, num_labels=2, hidden_dropout_prob=options.dropout,
            attention_probs_dropout_prob=options.dropout,
        )
        if "patched" in name:
            bertfast.patch(model)
        losses = Losses()
        with tempfile.TemporaryDirectory() as folder:
            loop = transformers.Trainer(
                model=model, train_dataset=train, eval_dataset=dev, callbacks=[losses],
                data_collator=transformers.DataCollatorWithPadding(tokenizer),
                compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
                args=transformers.TrainingArguments(
                    output_dir=folder, per_device_train_batch_size=options.batch_size, num_train_epochs=1,
                    learning_rate=5e-5, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
                    bf16="bf16" in name, disable_tqdm=True, logging_nan_inf_filter=False,
                ),
            )
            loop.remove_callback(transformers.PrinterCallback)
            began = time.perf_counter()
            loop.train()
            seconds = time.perf_counter() - began
            accuracy = loop.evaluate()["eval_accuracy"]
        first = first or losses.curve
        deviation = max(abs(a - b) for a, b in zip(first, losses.curve, strict=True))
        print(f"{name:14s} {len(train) / seconds:9.1f} {accuracy:8.4f} {losses.curve[-1]:9.4f} {deviation:14.1e}",
              flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (embeddings, trainer):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--model", required=True, help="a checkpoint's folder")
        command.add_argument("--batch-size", type=int, default=32)
        if function is embeddings:
            command.add_argument("--sentences", required=True)
            command.add_argument("--count", type=int, default=2000)
            command.add_argument("--rounds", type=int, default=5)
        else:
            command.add_argument("--train", required=True)
            command.add_argument("--dev", required=True)
            command.add_argument("--count", type=int, default=10_000)
            command.add_argument("--dropout", type=float, default=0.1)
            command.add_argument("--only", default="original fp32,patched fp32,original bf16,patched bf16")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}; "
          f"{machine.keep_pages()}")
    options.function(options)


if __name__ == "__main__":
    main()
