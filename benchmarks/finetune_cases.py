"""Fine-tuning on public sets: ours and transformers' quality, their speed, and what pretraining buys.

  python benchmarks/finetune_cases.py quality  --data SETS --model CKPT --out tasks.json [--cases sst2,trec] [--steps N]
  python benchmarks/finetune_cases.py speed    --data SETS --model CKPT --out finetune.json [--window 60] [--rounds 3]
  python benchmarks/finetune_cases.py transfer --data SETS --model CKPT --out transfer.json

`quality` trains each case to its end, ours and the peer of finetune.py with the same data, start, hyper-parameters and
steps, and scores both with our metrics. `transfer` trains on trec and ud_ewt from CKPT and from the same encoder with
random weights: all of it, its head alone, on cached features, and on the word table alone. Every row is written when it
is there, and a second run goes on where the first stopped. `bertfast bench report` makes tables of the results.

SETS holds the public sets by name (sst2, trec_qc, clinc150, mrpc, rte, stsb, ud_ewt, wnut17, squad_v1_dev, copa,
cosmosqa_valid, e2e_clean), each in its distributor's files.
"""

import argparse
import csv
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bertfast.benchmarks import contest, report
from bertfast.benchmarks.finetune import Peer, rows

from bertfast import machine
from bertfast.checkpoint import find
from bertfast.config import BertConfig
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError
from bertfast.finetune.task import Settings
from bertfast.finetune.train import FineTuning, finetune
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
TRANSFER: dict[str, dict[str, Any]] = {  # how much of the encoder learns
    "fine-tuned": {"lr": 5e-4}, "frozen": {"freeze": "all", "lr": 1e-3}, "features": {"features": True, "lr": 5e-3},
    "static": {"features": True, "static": True, "lr": 5e-3},
}

TRANSFER_SEEDS = 3


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


def settings_of(name: str, work: Path, args) -> Settings:
    """A case's settings, judged once, at the end."""
    task, train, dev, options, _ = CASES[name]
    paths = [str(work / p[1:] if p.startswith("@") else args.data / p) for p in (train, dev)]
    chosen = Settings(task, args.model, *paths, **{"precision": args.precision, **options})
    chosen.steps, chosen.eval_every = args.steps or chosen.steps, 10**9
    return chosen


# ---- one training


def train(contender: str, settings: dict, folder: Path, threads: int) -> dict[str, float]:
    """A contender's metrics after its last step, and the seconds it took with reading and evaluation."""
    torch.set_num_threads(threads)
    allocator = machine.keep_pages()
    chosen, began = Settings(**settings), time.perf_counter()
    if contender == "bertfast":
        scores = dict(finetune(folder, chosen, allocator, overwrite=True)["best"])
        steps = scores.pop("step")
        scores.pop("seed")
    else:
        work = FineTuning(folder, chosen)
        peer, batches, steps = Peer(work, chosen.precision == "bf16"), work.batches(chosen.seed), work.steps
        for step in range(1, steps + 1):
            peer.step(next(batches), work.learning_rate(step))
        scores = peer.evaluate()
    return {"steps": steps, "metrics": scores, "seconds": time.perf_counter() - began}


def in_a_process(contender: str, settings: Settings, folder: Path, threads: int) -> dict:
    """`train`, or {"failed": why}."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return {"failed": "", **pool.submit(train, contender, asdict(settings), folder, threads).result()}
        except Exception as error:  # whatever it is, it is that training's result
            return {"failed": f"{type(error).__name__}: {error}"}


def random_copy(model: str, folder: Path, seed: int) -> str:
    """The same architecture and vocabulary with random weights."""
    torch.manual_seed(seed)
    BertModel(BertConfig.from_file(find(model) / "config.json")).save_pretrained(folder)
    Tokenizer.load(find(model)).save(folder)
    return str(folder)


# ---- what is wanted of a case


def speed(name: str, settings: Settings, args) -> list[dict]:
    """A row a contender. Raises KeyboardInterrupt where Ctrl-C cut it short: nothing half is kept."""
    found, stopped = rows(name, settings, args.window, args.rounds, args.threads)
    if stopped:
        raise KeyboardInterrupt
    return found


def quality(name: str, settings: Settings, seeds: int, work: Path, args) -> Iterator[tuple[dict, Any]]:
    """(what names the row, how to get the rest)."""
    for seed in range(1, seeds + 1):
        for contender in args.contenders.split(","):
            chosen = replace(settings, seed=seed)
            yield ({"key": name, "contender": contender, "seed": seed, "asked": settings.steps or 0},
                   lambda c=contender, s=chosen: [in_a_process(c, s, work / "run", args.threads)])


def transfer(name: str, settings: Settings, seeds: int, work: Path, threads: int) -> Iterator[tuple[dict, Any]]:
    for seed in range(1, seeds + 1):
        starts = {"pretrained": settings.model, "random": random_copy(settings.model, work / "random", seed)}
        for start, model in starts.items():
            for style, changes in TRANSFER.items():
                chosen = replace(settings, model=model, seed=seed, **changes)
                yield ({"key": name, "contender": f"{start}, {style}", "seed": seed},
                       lambda s=chosen: [in_a_process("bertfast", s, work / "run", threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "speed", "transfer"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", help="names, with commas between; by default all")
    parser.add_argument("--seeds", type=int, help="instead of each case's own")
    parser.add_argument("--steps", type=int, help="instead of each case's own")
    parser.add_argument("--contenders", default="bertfast,transformers", help="whose quality is wanted")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both contenders' training")
    parser.add_argument("--window", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    suite = {"quality": "tasks", "speed": "finetune", "transfer": "transfer"}[args.what]
    before = report.load(args.out) if args.out.exists() else {"rows": []}
    found: list[dict] = before["rows"]
    settings = {"model": Path(args.model).name, "precision": args.precision,
                "window": args.window, "rounds": args.rounds}
    head = {"suite": suite, **contest.provenance(args.threads), "settings": settings}
    for name in ("suite", "settings", "threads", "hardware", "versions") if found else ():
        if before[name] != head[name]:  # one head stands for all rows
            raise UserError(f"{args.out} holds rows of another {name}: choose another --out")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(args.data, work)
        default = "trec,ud_ewt" if args.what == "transfer" else ",".join(CASES)
        for name in (args.cases or default).split(","):
            chosen = settings_of(name, work, args)
            if args.what == "speed":
                wanted = [({"key": name}, partial(speed, name, chosen, args))]
            elif args.what == "transfer":
                wanted = transfer(name, chosen, args.seeds or TRANSFER_SEEDS, work, args.threads)
            else:
                wanted = quality(name, chosen, args.seeds or CASES[name][4], work, args)
            for naming, get in wanted:
                if not any(naming.items() <= row.items() for row in found):
                    found += [{**naming, **row} for row in get()]
                    report.write({**head, "rows": found}, args.out)
    report.show(report.load(args.out))


if __name__ == "__main__":
    machine.keep_pages()
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        raise SystemExit(f"finetune_cases.py: {error}") from error
