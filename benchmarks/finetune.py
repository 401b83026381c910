"""Fine-tuning against transformers: the same start, data, hyper-parameters and steps; quality, then speed.

  python benchmarks/finetune.py quality --data SETS --model CKPT --out finetune.json [--cases sst2,trec] [--steps N]
  python benchmarks/finetune.py speed   --data SETS --model CKPT --out speed.json [--window 60] [--rounds 3]
  python benchmarks/finetune.py transfer --data SETS --model CKPT --out transfer.json    (what pretraining buys)

The peer is the usual transformers script: padding to the longest of a batch, AdamW, clipping, linear schedule; its loop
is written out, without the Trainer's bookkeeping, which would only slow it. It reads our token ids and is scored by our
metrics, so that what differs is the engine. `quality` writes each result when it has it and goes on where it stopped;
in `speed` the contenders take turns of `window` seconds, in processes of their own. `transfer` trains on trec and
ud_ewt from CKPT and from the same encoder with random weights: all of it, its head alone, and on cached features.

SETS holds the public sets by name (sst2, trec_qc, clinc150, mrpc, rte, stsb, ud_ewt, wnut17, squad_v1_dev, copa,
cosmosqa_valid, e2e_clean), each in its distributor's files.
"""

import argparse
import csv
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bertfast.benchmarks import contest

from bertfast import machine
from bertfast.checkpoint import find
from bertfast.config import BertConfig
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import write_json
from bertfast.finetune.batches import Item, by_budget
from bertfast.finetune.task import Settings
from bertfast.finetune.train import FineTuning, Window, finetune
from bertfast.model import BertModel

# name: (task, train, dev, options, seeds); files beginning with @ are made by `prepare`
CASES: dict[str, tuple[str, str, str, dict[str, Any], int]] = {
    "sst2": ("classification", "sst2/train.tsv", "sst2/dev.tsv", {"steps": 1000, "lr": 1e-4}, 1),
    "trec": ("classification", "@trec_train.tsv", "@trec_test.tsv", {"epochs": 4.0, "lr": 1e-4}, 1),
    "clinc150": ("classification", "@clinc_train.jsonl", "@clinc_val.jsonl", {"epochs": 3.0, "lr": 3e-4}, 1),
    "mrpc": ("classification", "mrpc/train.tsv", "mrpc/dev.tsv", {"metric": "f1", "lr": 1e-4}, 3),
    "rte": ("classification", "rte/train.tsv", "rte/dev.tsv", {"lr": 1e-4}, 3),
    "stsb": ("regression", "stsb/train.tsv", "stsb/dev.tsv", {"lr": 1e-4}, 1),
    "ud_ewt": ("tagging", "ud_ewt/train.form_upos_xpos.tsv", "ud_ewt/dev.form_upos_xpos.tsv",
               {"label": "2", "epochs": 2.0, "lr": 3e-4}, 1),
    "wnut17": ("tagging", "wnut17/wnut17train.conll", "wnut17/emerging.dev.conll", {"epochs": 4.0, "lr": 3e-4}, 3),
    "squad": ("qa", "@squad_train.json", "@squad_eval.json", {"steps": 300, "lr": 1e-4}, 1),
    "copa": ("multiple-choice", "copa/train.jsonl", "copa/val.jsonl", {"epochs": 10.0, "lr": 1e-4}, 3),
    "cosmosqa": ("multiple-choice", "@cosmos_train.csv", "@cosmos_dev.csv", {"epochs": 2.0, "batch_size": 8}, 3),
    "e2e": ("seq2seq", "e2e_clean/devel-fixed.no-ol.csv", "e2e_clean/test-fixed.csv",
            {"steps": 2000, "lr": 3e-4, "max_target_length": 80}, 1),
    "e2e_prefix": ("seq2seq", "e2e_clean/devel-fixed.no-ol.csv", "e2e_clean/test-fixed.csv",
                   {"steps": 2000, "lr": 3e-4, "max_target_length": 80, "style": "prefix-lm"}, 1),
}
PEERS = {"classification": "BertForSequenceClassification", "regression": "BertForSequenceClassification",
         "tagging": "BertForTokenClassification", "qa": "BertForQuestionAnswering",
         "multiple-choice": "BertForMultipleChoice", "seq2seq": "EncoderDecoderModel"}


TRANSFER: dict[str, dict[str, Any]] = {  # how much of the encoder learns
    "fine-tuned": {}, "frozen": {"freeze": "all", "lr": 1e-3}, "features": {"features": True, "lr": 5e-3},
}


def prepare(data: Path, work: Path) -> None:
    """The sets whose files are not rows, or have no split, as files that `bertfast finetune` reads."""
    for part in ("train", "test"):
        with open(data / f"trec_qc/{part}.txt", encoding="latin-1") as source, open(
            work / f"trec_{part}.tsv", "w", encoding="utf-8"
        ) as file:
            file.write("label\ttext\n")
            file.writelines(line.partition(":")[0] + "\t" + line.partition(" ")[2] for line in source)
    intents = json.loads((data / "clinc150/data_full.json").read_text())
    for part in ("train", "val"):
        rows = (json.dumps({"text": text, "intent": intent}) + "\n" for text, intent in intents[part])
        (work / f"clinc_{part}.jsonl").write_text("".join(rows))
    articles = json.loads((data / "squad_v1_dev/dev-v1.1.rebuilt.json").read_text())["data"]
    split = json.loads((data / "squad_v1_dev/split_by_article.json").read_text())
    for part in ("train", "eval"):
        kept = [article for article in articles if article["title"] in split[part]]
        (work / f"squad_{part}.json").write_text(json.dumps({"data": kept}))
    with open(data / "cosmosqa_valid/valid.csv", newline="") as file:
        questions = list(csv.DictReader(file))
    contexts = sorted({row["context"] for row in questions})
    held_out = set(random.Random(0).sample(contexts, 480))
    for part, wanted in (("train", False), ("dev", True)):
        with open(work / f"cosmos_{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(questions[0]))
            writer.writeheader()
            writer.writerows(row for row in questions if (row["context"] in held_out) == wanted)


def settings_of(name: str, data: Path, work: Path, model: str, seed: int, steps: int | None) -> Settings:
    """A case's settings, judged once, at the end."""
    task, train, dev, options, _ = CASES[name]
    paths = [str(work / p[1:] if p.startswith("@") else data / p) for p in (train, dev)]
    chosen = Settings(task, model, *paths, **{"precision": "fp32", **options, "seed": seed})
    chosen.steps, chosen.eval_every = steps or chosen.steps, 10**9
    return chosen


class Peer:
    """transformers' model for a task on our items: the usual loop."""

    def __init__(self, work: FineTuning, bf16: bool = False):
        import transformers

        torch.manual_seed(work.settings.seed)
        self.work, self.task, self.bf16 = work, work.task, bf16
        self.pad = work.tokenizer.pad_id
        cls = getattr(transformers, PEERS[work.settings.task])
        start = work.settings.model
        if cls is transformers.EncoderDecoderModel:
            self.model = cls.from_encoder_decoder_pretrained(start, start)
            special = {"decoder_start_token_id": work.tokenizer.cls_id, "pad_token_id": self.pad,
                       "eos_token_id": work.tokenizer.sep_id}
            self.model.config.update(special)
            self.model.generation_config.update(**special)
        else:
            n = len(self.task.labels) if self.task.named_outputs else 2
            kind = {"regression": "regression"}.get(work.settings.task)
            self.model = cls.from_pretrained(start, num_labels=n, problem_type=kind)
        self.model.train()
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        other = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": work.settings.weight_decay}, {"params": other, "weight_decay": 0.0}],
            eps=1e-8, fused=True)

    def inputs(self, items: list[Item]) -> dict[str, torch.Tensor]:
        """The items as transformers takes them, padded to the longest."""
        task = self.work.settings.task
        sequences = [s for item in items for s in item.sequences]
        batch = {"input_ids": self._padded([s.ids for s in sequences], self.pad),
                 "token_type_ids": self._padded([np.arange(len(s.ids)) >= s.second for s in sequences], 0),
                 "attention_mask": self._padded([np.ones(len(s.ids)) for s in sequences], 0)}
        if task == "multiple-choice":
            batch = {name: t.view(len(items), -1, t.shape[1]) for name, t in batch.items()}
        if items[0].target is not None or task == "tagging":
            if task == "tagging":
                rows = [np.full(len(s.ids), -100) for s in sequences]
                for row, s in zip(rows, sequences):
                    row[s.reads] = s.labels
                batch["labels"] = self._padded(rows, -100)
            elif task == "seq2seq":
                batch["labels"] = self._padded([item.target for item in items], -100)
                del batch["token_type_ids"]
            elif task == "qa":
                begin, end = torch.tensor([item.target for item in items]).unbind(1)
                batch.update(start_positions=begin, end_positions=end)
            else:
                batch["labels"] = torch.from_numpy(np.array([item.target for item in items]))
        return batch

    def _padded(self, rows: list, value: int) -> torch.Tensor:
        tensors = [torch.from_numpy(np.asarray(row, np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def step(self, items: list[Item], lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.inputs(items)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.work.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        work, task, outputs = self.work, self.task, []
        self.model.eval()
        for items in by_budget(work.dev_items, 2048):
            inputs = self.inputs(items)
            if work.settings.task == "seq2seq":
                ids = self.model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                          max_new_tokens=work.settings.max_target_length, num_beams=1, do_sample=False)
                end = work.tokenizer.sep_id
                outputs += [np.array([*row[1:], end][: [*row[1:], end].index(end)]) for row in ids.tolist()]
                continue
            out = self.model(**inputs)
            if work.settings.task == "tagging":
                rows = out.logits.argmax(-1).numpy()
                outputs += [row[item.sequences[0].reads] for row, item in zip(rows, items)]
            elif work.settings.task == "qa":
                rows = torch.stack([out.start_logits, out.end_logits], 2).numpy()
                outputs += [row[: item.n_tokens] for row, item in zip(rows, items)]
            else:
                outputs += list(out.logits.numpy())
        return task.score(work.dev_examples, task.predictions(work.dev_examples, work.dev_items, outputs))


def quality(contender: str, settings: dict, folder: Path, threads: int) -> dict:
    """One training of one contender: its metrics, and the seconds it took with reading and evaluation."""
    torch.set_num_threads(threads)
    allocator = machine.keep_pages()
    chosen, began = Settings(**settings), time.perf_counter()
    if contender == "bertfast":
        summary = finetune(folder, chosen, allocator, overwrite=True)
        return {**summary["best"], "seconds": time.perf_counter() - began}
    work = FineTuning(folder, chosen)
    peer = Peer(work)
    batches = work._batches(chosen.seed)
    for step in range(1, work.steps + 1):
        peer.step(next(batches), work.learning_rate(step))
    return {"seed": chosen.seed, "step": work.steps, **peer.evaluate(), "seconds": time.perf_counter() - began}


def speed(contender: str, settings: dict, window: float) -> Iterator[dict]:
    """Training for `window` seconds a turn: {"seconds", "samples", "flops": the useful ones, where we count them}."""
    chosen = Settings(**{**settings, "precision": "bf16" if contender == "bertfast bf16" else "fp32"})
    with tempfile.TemporaryDirectory() as folder:
        work = FineTuning(Path(folder), chosen)
        batches = work._batches(chosen.seed)
        if contender.startswith("bertfast"):
            model = work.model_for(chosen.seed)
            optimizer = work.optimizer_for(model)
        else:
            peer = Peer(work, bf16=contender.endswith("bf16"))
        def train() -> tuple[int, float]:
            items, flops = next(batches), Window()
            if contender.startswith("bertfast"):
                work._step(model, optimizer, items, chosen.seed, 1, flops)
            else:
                peer.step(items, 1e-5)
            return len(items), flops.flops

        for _ in range(3):
            train()
        yield {"ready": 1.0}
        while True:
            began, samples, flops = time.perf_counter(), 0, 0.0
            while time.perf_counter() - began < window:
                n, more = train()
                samples, flops = samples + n, flops + more
            yield {"seconds": time.perf_counter() - began, "samples": samples, "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "speed", "transfer"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", help="names, with commas between; by default all")
    parser.add_argument("--steps", type=int, help="instead of each case's own")
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    stored = json.loads(args.out.read_text()) if args.out.exists() else {"cases": {}}
    stored["provenance"] = contest.provenance(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args.data, work)
        default = "trec,ud_ewt" if args.what == "transfer" else ",".join(CASES)
        for name in (args.cases or default).split(","):
            results = stored["cases"].setdefault(name, {})
            settings = partial(_settings, name, args, work)
            if args.what == "speed":
                results.update(_speed(settings(), args))
                _print_speed(name, results)
                write_json(args.out, stored)
                continue
            for key, contender, chosen in _trainings(args.what, name, settings, work):
                if key not in results:
                    results[key] = _train_once(contender, chosen, work, args.threads)
                    write_json(args.out, stored)
                print(f"{name}: {key}: {results[key]}", flush=True)


def _settings(name: str, args, work: Path, seed: int = 1) -> dict:
    return vars(settings_of(name, args.data, work, args.model, seed, args.steps))


def _trainings(what: str, name: str, settings, work: Path) -> Iterator[tuple[str, str, dict]]:
    """(key, contender, settings) of every training that `quality` or `transfer` wants of a case."""
    if what == "quality":
        for seed in range(1, CASES[name][4] + 1):
            for contender in ("bertfast", "transformers"):
                yield f"{contender} seed {seed} steps {settings(seed)['steps']}", contender, settings(seed)
        return
    pretrained = settings()["model"]
    for start in ("pretrained", "random"):
        model = pretrained if start == "pretrained" else str(_random_copy(pretrained, work / "random"))
        for style, changes in TRANSFER.items():
            yield f"{start}, {style}", "bertfast", {**settings(), **changes, "model": model}


def _random_copy(model: str, folder: Path) -> Path:
    """The same architecture and vocabulary with the weights it would have started pretraining from."""
    torch.manual_seed(0)
    BertModel(BertConfig.from_file(find(model) / "config.json")).save_pretrained(folder)
    Tokenizer.load(find(model)).save(folder)
    return folder


def _train_once(contender: str, settings: dict, work: Path, threads: int) -> dict | str:
    """The metrics of one training, in a process of its own; why there are none, where it fails."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(quality, contender, settings, work / "run", threads).result()
        except Exception as error:  # whatever it is, it is that training's result
            return f"failed: {type(error).__name__}: {error}"


def _speed(settings: dict, args) -> dict:
    names = ("bertfast fp32", "bertfast bf16", "transformers fp32", "transformers bf16")
    contenders = [contest.Contender("yardstick", contest.yardstick, {})] + [
        contest.Contender(n, speed, {"contender": n, "settings": settings, "window": args.window}) for n in names
    ]
    outcomes, _ = contest.contest(contenders, args.rounds, args.threads, lambda facts: {})
    peaks = contest.peaks(outcomes["yardstick"])
    rows: dict[str, Any] = {"peaks": peaks}
    for name in names:
        turns = outcomes[name].turns
        rows[name] = outcomes[name].failed or {
            "samples_per_second": [t["samples"] / t["seconds"] for t in turns],
            "useful_flops_per_sample": [t["flops"] / t["samples"] for t in turns],
        }
    return rows


def _print_speed(name: str, results: dict) -> None:
    middles = {n: statistics.median(r["samples_per_second"]) for n, r in results.items()
               if n != "peaks" and isinstance(r, dict)}
    best = max((v for n, v in middles.items() if n.startswith("transformers")), default=float("nan"))
    for contender, value in middles.items():
        flops = statistics.median(results[contender]["useful_flops_per_sample"])
        ceiling = results["peaks"]["fp32"] / flops / best if flops else float("nan")
        print(f"{name:12} {contender:20} {value:8.1f} samples/s  {value / best:5.2f} x the best peer"
              + (f"  (GEMMs alone at the fp32 peak: {ceiling:.2f} x)" if flops else ""), flush=True)
    for contender, result in results.items():
        if isinstance(result, str):
            print(f"{name:12} {contender}: {result}")


if __name__ == "__main__":
    machine.keep_pages()
    main()
