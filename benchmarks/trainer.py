"""What `bertfast.patch` gives a script that fine-tunes with transformers' Trainer: sentences in, a class out.

One epoch over the training file, cut into as many turns as there are rounds; original and patched models take turns,
each with its own optimiser and schedule, which go on from turn to turn. Before that, dropout off, the losses of the
first steps must be the original's, step by step. bf16 is the Trainer's own (autocast).
"""

import csv
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from bertfast.benchmarks import contest
from bertfast.benchmarks.contest import Contender, Outcome

from bertfast.checkpoint import find
from bertfast.files import UserError

CONTENDERS = ("original fp32", "original bf16", "patched fp32", "patched bf16")
REFERENCE = CONTENDERS[0]
CHECKED = 8  # steps whose losses must agree
LOSS_AGREES = {"fp32": 1e-4, "bf16": 2e-3}  # absolute; a new head starts near ln 2, so that little is much
BATCH, LR, DROPOUT, LONGEST = 32, 5e-5, 0.1, 128


def read_rows(path: str, count: int | None = None) -> list[tuple[str, int]]:
    """(sentence, class) of a TSV with a header. Raises UserError for another file."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        return [(sentence, int(label)) for sentence, label in rows][:count]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: a header, then sentence, tab, class as a number are wanted: {error}") from error


def fine_tuning(contender: str, model: str, train: str, dev: str, count: int, rounds: int,
                seed: int) -> Iterator[dict]:
    """Facts: losses with dropout off. A turn: {"seconds" (a sample), "loss"}, the last also the dev "accuracy"."""
    import transformers

    import bertfast

    kind, precision = contender.split()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def examples(rows):
        return [{**tokenizer(text, truncation=True, max_length=LONGEST), "labels": label} for text, label in rows]

    def build(dropout: float):
        transformers.set_seed(seed)
        made = transformers.BertForSequenceClassification.from_pretrained(
            model, num_labels=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        if kind == "patched":
            bertfast.patch(made)
        return made

    def trainer(model, data, folder, optimizers, losses):
        class Losses(transformers.TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))

        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=precision == "bf16",
            disable_tqdm=True, logging_nan_inf_filter=False, seed=seed)
        made = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers,
                                    data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[Losses()])
        made.remove_callback(transformers.PrinterCallback)
        return made

    data, judged = examples(read_rows(train, count)), examples(read_rows(dev))
    with tempfile.TemporaryDirectory() as folder:
        losses: list[float] = []
        trainer(build(0.0), data[: CHECKED * BATCH], folder, (None, None), losses).train()
        yield {"losses": losses}
        tuned = build(DROPOUT)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=LR, fused=True)
        steps = sum(-(-len(data[i::rounds]) // BATCH) for i in range(rounds))
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
        for i in range(rounds):
            losses = []
            loop = trainer(tuned, data[i::rounds], folder, (optimizer, schedule), losses)
            began = time.perf_counter()
            loop.train()
            turn = {"seconds": (time.perf_counter() - began) / len(data[i::rounds]), "loss": sum(losses) / len(losses)}
            if i == rounds - 1:
                found = loop.predict(judged)
                turn["accuracy"] = float((found.predictions.argmax(-1) == found.label_ids).mean())
            yield turn


def agreement(facts: dict[str, dict]) -> dict[str, str]:
    """Whose losses, dropout off, are not the original's, step by step; each contender's facts get its deviation."""
    wanted = facts.get(REFERENCE, {}).get("losses")
    refused = {}
    for name, found in facts.items():
        if "losses" not in found:
            continue
        if wanted is None:
            refused[name] = f"refused: {REFERENCE} failed, and nothing else says what is right"
            continue
        found["deviation"] = max(abs(a - b) for a, b in zip(found["losses"], wanted, strict=True))
        if not found["deviation"] <= LOSS_AGREES[name.split()[1]]:
            refused[name] = f"refused: a loss with dropout off is {found['deviation']:.1e} from {REFERENCE}'s"
    return refused


def run(*, model: str, train: str, dev: str, count: int, rounds: int, seed: int, threads: int) -> dict:
    """The result as JSON's types. Raises UserError for files that are not sentences and classes, or no checkpoint."""
    find(model)
    n_train, n_dev = len(read_rows(train, count)), len(read_rows(dev))
    if n_train < rounds * BATCH:
        raise UserError(f"{train} has {n_train} sentences, fewer than {rounds} turns of one batch of {BATCH}")
    if not n_dev:
        raise UserError(f"{dev} has no sentence to judge by")
    arguments = {"model": model, "train": train, "dev": dev, "count": count, "rounds": rounds, "seed": seed}
    entrants = [Contender("machine", contest.yardstick, {}),
                *(Contender(name, fine_tuning, {"contender": name, **arguments}) for name in CONTENDERS)]
    outcomes, stopped = contest.contest(entrants, rounds, threads, agreement)
    peaks = contest.peaks(outcomes.pop("machine"))
    settings = {"model": Path(model).name, "sentences": n_train, "judged": n_dev, "rounds": rounds, "seed": seed,
                "batch_size": BATCH}
    return {"suite": "trainer", **contest.provenance(threads), "settings": settings, "machine": peaks,
            "stopped_early": stopped, "rows": [_row(name, outcome) for name, outcome in outcomes.items()]}


def _row(name: str, outcome: Outcome) -> dict:
    row = {"key": "trainer", "contender": name, "failed": outcome.failed, **outcome.facts}
    if outcome.failed or not outcome.turns:
        return row
    return {**row, "samples": outcome.values(), **contest.middle(outcome.values()),
            "loss": outcome.turns[-1]["loss"], "accuracy": outcome.turns[-1].get("accuracy")}
