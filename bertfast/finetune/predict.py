"""A fine-tuned checkpoint on new text: rows are read, packed, computed and written in streams, in their order."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bertfast import machine, report
from bertfast.checkpoint import find
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError, atomic_path, read_json, without_links
from bertfast.finetune import show
from bertfast.finetune.batches import Item, by_budget, pack
from bertfast.finetune.read import Row, refuse_names
from bertfast.finetune.task import Settings, Task
from bertfast.finetune.tasks import TASKS

CHUNK = 2048  # rows in memory at a time


def with_features(model, task: Task, items: list[Item], tokens: int, go_on: Callable[[], None]) -> list[Item]:
    """The items with what a BertForFeatures reads of them, computed once. go_on: called before each batch."""
    result: list[Item] = []
    device = next(model.parameters()).device
    with report.counter("examples encoded") as count:
        for group in by_budget(items, tokens):
            go_on()
            sequences = [s for item in group for s in item.sequences]
            rows = model.features(pack(sequences).to(device)).cpu()
            parts = rows.split([task.n_features(item) for item in group])
            result += [item._replace(features=part) for item, part in zip(group, parts)]
            count(len(result))
    return result


@torch.no_grad()
def run(model, task: Task, items: list[Item], tokens: int,
        go_on: Callable[[], None] = lambda: None) -> list[np.ndarray]:
    """The head's output for each item, computed in batches of at most `tokens` tokens; the model's mode is kept.

    go_on: called before each batch; it may raise.
    """
    training = model.training
    model.eval()
    outputs: list[np.ndarray] = []
    for group in by_budget(items, tokens) if items else []:
        go_on()
        outputs += task.infer(model, group)
    model.train(training)
    return outputs


class Predictor:
    """A checkpoint that `bertfast finetune` wrote, ready to predict."""

    def __init__(self, folder: str | Path, precision: str = "auto"):
        """folder: the checkpoint's or its run's. Raises UserError for any other, for a damaged one, and for a precision
        that the device has not."""
        folder = Path(folder)
        if (folder / "checkpoint" / "finetune.json").is_file():  # the run's folder was given
            folder = folder / "checkpoint"
        folder = find(folder)
        if not (folder / "finetune.json").is_file():
            raise UserError(f"{folder} was not fine-tuned by bertfast: it has no finetune.json")
        self.folder = folder.resolve()
        stored = read_json(folder / "finetune.json")
        self.tokenizer = Tokenizer.load(folder)
        config = read_json(folder / "config.json")
        try:
            self.settings, labels = Settings(**stored["settings"]), list(stored["labels"])
            positions = config.get("encoder", config)["max_position_embeddings"]
            self.task = TASKS[self.settings.task](self.settings, self.tokenizer, positions, labels)
            n_outputs = len(config.get("id2label") or "01")  # transformers' default is two labels
            if self.task.named_outputs and n_outputs != len(labels):
                raise KeyError("id2label")
            self.task.read_roles, self.task.read_columns = stored["roles"], dict(stored["columns"])
            self.task.read_format = stored["format"]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} is damaged or of another version: its finetune.json and config.json do not say "
                            "what it predicts") from error
        device = machine.choose_device()
        self.precision, self.precision_reason = machine.choose_precision(precision, device)
        self.model = self.task.head.from_pretrained(folder).to(device, machine.DTYPES[self.precision]).eval()

    def predict(self, rows: Iterator[Row], columns: dict[str, str]) -> Iterator[dict]:
        """One JSON object a row, in order; CHUNK rows are read at a time."""
        while chunk := list(islice(rows, CHUNK)):
            examples = [self.task.example(row, columns, labelled=False) for row in chunk]
            items = self.task.items(examples)
            yield from self.task.predictions(examples, items, run(self.model, self.task, items, self.settings.tokens))


def predict_file(predictor: Predictor, source: Path, out: Path, columns: list[str] | None = None) -> dict:
    """Predict every row of a file into JSON lines, written as a whole or not at all: {"rows", "seconds", "decisions"}.

    columns: names for a file without header, if they differ from the training file's. Raises UserError where `out`
    lies in the checkpoint's folder, or is a file that does not begin as predictions of this task do.
    """
    refuse_names(source, columns)
    table = predictor.task.open(source, columns)
    found = predictor.task.as_in_training(table, predictor.task.find_columns(table, labelled=False))
    if out.is_dir():
        raise UserError(f"{out} is a folder, not a file to write")
    if out.exists() and (not out.is_file() or out.samefile(source)):  # a device would be replaced, too
        raise UserError(f"{out} is {'the input' if out.is_file() else 'no file'}: choose another --out")
    if any(path.is_relative_to(predictor.folder) for path in map(without_links, (out, out.parent))):
        raise UserError(f"{out} lies in the model's folder: choose another --out")
    other = UserError(f"{out} exists already and holds no predictions: choose another --out")
    earlier = _first_object(out) if out.exists() else {}
    if earlier is None:
        raise other
    began, n = time.perf_counter(), 0
    with atomic_path(out) as path, open(path, "w", encoding="utf-8") as file, report.counter("predicted") as count:
        for n, prediction in enumerate(predictor.predict(iter(table), found), 1):
            if earlier and earlier.keys() != prediction.keys():
                raise other
            file.write(json_line(prediction))
            count(n)
        if n == 0:
            raise UserError(f"{source} holds no examples")
    show.understood(table, found, n)
    return {"rows": n, "seconds": time.perf_counter() - began, "decisions": dict(predictor.task.counts)}


def _first_object(path: Path) -> dict | None:
    """What a file of JSON lines begins with, {} where it is empty; None for another file."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.readline() or b"{}")
        return value if isinstance(value, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def json_line(value: dict) -> str:
    """Raises UserError for NaN and infinities, which JSON lacks."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError("a prediction is not a finite number: use --precision fp32") from error
