"""Classification (one sentence or a pair; one label or several), regression, multiple choice: a decision on [CLS]."""

import math
import re
from typing import Any

import numpy as np
import torch

from bertfast.config import BertConfig
from bertfast.files import UserError
from bertfast.finetune import metrics
from bertfast.finetune.batches import Item
from bertfast.finetune.read import Row, Table
from bertfast.finetune.task import Example, Task, require_text
from bertfast.heads import BertForMultipleChoice, BertForSequenceClassification


class Classification(Task):
    """[CLS] text [SEP] (pair [SEP]) -> one label, or with multi_label any number of them."""

    head = BertForSequenceClassification
    roles = ("text", "text_pair", "label")
    optional = ("text_pair",)

    def __init__(self, settings, tokenizer, max_positions, labels=None):
        super().__init__(settings, tokenizer, max_positions, labels)
        self.several = settings.multi_label
        self.metrics = ("f1", "macro_f1", "accuracy") if self.several else ("accuracy", "f1", "mcc")

    def find_columns(self, table: Table, labelled: bool = True) -> dict[str, str]:
        columns = super().find_columns(table, labelled)
        if "text_pair" in columns and not self.settings.text_pair:  # a pair found by name belongs to a first by name
            pairs = {"sentence1": "sentence2", "premise": "hypothesis", "question1": "question2",
                     "#1 string": "#2 string", "text1": "text2", "text": "text_pair", "question": "sentence"}
            named = self.settings.text and self.read_roles is None
            if named or pairs.get(columns["text"].lower()) != columns["text_pair"].lower():
                del columns["text_pair"]
        return columns

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        inputs = tuple(require_text(row, columns[role]) for role in ("text", "text_pair") if role in columns)
        if not all(text.strip() for text in inputs):
            self.counts["rows with an empty text, kept"] += 1
        label = self.label_of(row, columns["label"]) if labelled else None
        return Example(row.where, inputs, label)

    def label_of(self, row: Row, column: str) -> Any:
        value = row.values.get(column)
        if self.several:
            parts = value if isinstance(value, list) else str("" if value is None else value).split(
                self.settings.label_separator)
            return sorted({_name(part) for part in parts if part is not None} - {""})
        if isinstance(value, list):
            raise UserError(f"{row.where}: {column} is a list: say --multi-label if a row may have several labels")
        if isinstance(value, (dict, bytes)):
            raise UserError(f"{row.where}: {column} is {value!r}, not a label")
        if value is None or value != value or not _name(value):  # NaN, where pandas had nothing
            raise UserError(f"{row.where}: no label in {column}")
        return _name(value)

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        metrics.need("sklearn.metrics")
        each = lambda examples: ((label, e.where) for e in examples for label in (e.label if self.several
                                                                                  else [e.label]))
        self.set_labels(each(train), each(dev))

    def items(self, examples: list[Example]) -> list[Item]:
        texts = [e.inputs if len(e.inputs) == 2 else e.inputs[0] for e in examples]
        return [Item(i, [sequence], self.target(example))
                for i, (example, sequence) in enumerate(zip(examples, self.encode_texts(texts)))]

    def target(self, example: Example) -> Any:
        """What the loss compares with: a label's id, a 0/1 row, a number; None where it is not known."""
        if example.label is None:
            return None
        if self.several:
            return np.isin(self.labels, example.label).astype(np.float32)
        return self.label_ids[example.label]

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        if any(item.target is None for item in items):
            return {}
        return {"labels": torch.from_numpy(np.array([item.target for item in items]))}

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        if self.several:
            scores = [1 / (1 + np.exp(-o)) for o in outputs]
            return [{"labels": [label for label, p in zip(self.labels, s) if p > 0.5], "scores": self._named(s)}
                    for s in scores]
        scores = [_softmax(o) for o in outputs]
        return [{"label": self.labels[int(s.argmax())], "scores": self._named(s)} for s in scores]

    def _named(self, scores: np.ndarray) -> dict[str, float]:
        return {label: round(float(p), 6) for label, p in zip(self.labels, scores)}

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        if self.several:
            table = lambda rows: np.array([np.isin(self.labels, labels) for labels in rows])
            return metrics.multi_label(table([e.label for e in examples]), table([p["labels"] for p in predictions]))
        gold, guess = self.decisions(examples, predictions)
        return metrics.classification(gold, guess, len(self.labels))

    def decisions(self, examples: list[Example], predictions: list[dict]) -> tuple[list[int], list[int]]:
        """(gold, guess) as label ids: what the confusion picture is drawn from."""
        return ([self.label_ids[e.label] for e in examples], [self.label_ids[p["label"]] for p in predictions])

    def configure(self, config: BertConfig) -> None:
        super().configure(config)
        config.extra["problem_type"] = "multi_label_classification" if self.several else "single_label_classification"

    def shown(self, example: Example) -> dict[str, str]:
        texts = dict(zip(("text", "pair"), example.inputs))
        return {**texts, "label": ", ".join(example.label) if self.several else str(example.label)}


def _name(value: Any) -> str:
    """A label as its file has it: JSON's true is no True."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


class Regression(Classification):
    """A number for a text or a pair. symmetric: both orders are encoded and their outputs averaged (GPT-1 adds the
    two vectors before its linear layer, Radford et al. 2018: the same up to a factor that the layer learns)."""

    def __init__(self, settings, tokenizer, max_positions, labels=None):
        super().__init__(settings, tokenizer, max_positions, labels)
        self.several, self.metrics = False, ("pearson", "spearman")

    def label_of(self, row: Row, column: str) -> float:
        value = row.values.get(column)
        try:
            number = float("nan" if value is None else value)
        except (TypeError, ValueError, OverflowError):  # JSON's integers have no bound
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{row.where}: {column} is {value!r}, not a number")
        return number

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        metrics.need("scipy.stats")
        if len({e.label for e in train}) < 2:
            raise UserError(f"{self.settings.train}: all rows have the same number: nothing to learn")
        self.labels, self.label_ids = ["LABEL_0"], {"LABEL_0": 0}

    def items(self, examples: list[Example]) -> list[Item]:
        items = super().items(examples)
        if not self.settings.symmetric:
            return items
        if any(len(e.inputs) != 2 for e in examples):
            raise UserError("--symmetric needs pairs: name the second text's column with --text-pair")
        turned = self.encode_texts([e.inputs[::-1] for e in examples])
        return [item._replace(sequences=[*item.sequences, other]) for item, other in zip(items, turned)]

    def target(self, example: Example) -> Any:
        return None if example.label is None else np.float32(example.label)

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        arguments = super().forward_arguments(items)
        return {**arguments, "orders": 2} if self.settings.symmetric else arguments

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        return [{"score": float(f"{o[0]:.7g}")} for o in outputs]

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        return metrics.correlation([e.label for e in examples], [p["score"] for p in predictions])

    def configure(self, config: BertConfig) -> None:
        super().configure(config)
        config.extra["problem_type"] = "regression"

    def shown(self, example: Example) -> dict[str, str]:
        return {**dict(zip(("text", "pair"), example.inputs)), "number": f"{example.label:g}"}


class MultipleChoice(Task):
    """[CLS] context [SEP] (question) option [SEP] for each option; the highest score wins. Any number of options."""

    head = BertForMultipleChoice
    roles = ("text", "text_pair", "label")
    optional = ("text_pair",)
    metrics = ("accuracy",)
    named_outputs = False
    feature_rows = "options"
    LISTS = ("choices", "options", "endings", "answers")
    NUMBERED = re.compile(r"(?:choice|option|ending|answer|sol|solution|alternative)[ _-]?(\d+|[a-j])", re.I)

    def find_columns(self, table: Table, labelled: bool = True) -> dict[str, str]:
        columns = super().find_columns(table, labelled)
        wanted = self.settings.choices
        missing = [name for name in wanted if name not in table.columns]
        if missing:
            raise UserError(f"{table.path} has no column {missing[0]!r}; there are: {', '.join(table.columns)}")
        family = lambda c: c[: match.start(1)] if (match := self.NUMBERED.fullmatch(c)) else c
        trained = set(map(family, self.read_columns.get("choices", ())))  # a row may have more options, or fewer
        self.option_columns = (
            wanted or [c for c in table.columns if family(c) in trained]
            or [c for c in table.columns if c.lower() in self.LISTS][:1]
            or [c for c in table.columns if self.NUMBERED.fullmatch(c)]
        )
        if not self.option_columns:
            raise UserError(f"{table.path}: which columns hold the options? Name them with --choices a,b,c; "
                            f"there are: {', '.join(table.columns)}")
        return columns

    def as_in_training(self, table: Table, columns: dict[str, str]) -> dict[str, str]:
        if self.read_roles is None:
            self.read_columns["choices"] = self.option_columns
        return super().as_in_training(table, columns)

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        values = [row.values.get(column) for column in self.option_columns]
        options = values[0] if len(values) == 1 and isinstance(values[0], list) else values
        if options is values and len(values) > 2 and values[-1] in (None, ""):
            self.counts["rows whose last option columns are empty: questions with fewer options"] += 1
            while len(values) > 2 and values[-1] in (None, ""):
                values.pop()
        for i, option in enumerate(options, 1):
            if option is not None and not isinstance(option, str):
                raise UserError(f"{row.where}: option {i} of {len(options)} is {option!r}, not text")
            if not option or not option.strip():
                raise UserError(f"{row.where}: option {i} of {len(options)} is missing")
        if len(options) < 2:
            raise UserError(f"{row.where}: {len(options)} option: there is nothing to choose")
        question = require_text(row, columns["text_pair"]) + " " if "text_pair" in columns else ""
        label = row.values.get(columns["label"]) if labelled else None
        if labelled and (label is None or not str(label).strip()):
            raise UserError(f"{row.where}: no label in {columns['label']}")
        inputs = (require_text(row, columns["text"]), question, options)
        return Example(row.where, inputs, None if label is None else str(label).strip())

    def group(self, example: Example) -> str:
        return example.inputs[0]

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        """What the labels count from: 0, 1 or A. The habit of the set is kept in `labels`, a name an option."""
        letters = [chr(ord("A") + i) for i in range(26)]
        fewest = train + dev  # rows that do not fit the style that most fit
        for style in map(str, range(100)), map(str, range(1, 101)), letters, map(str.lower, letters):
            self.labels = list(style)
            self.label_ids = {name: i for i, name in enumerate(self.labels)}
            wrong = [e for e in train + dev if self.label_ids.get(e.label, 100) >= len(e.inputs[2])]
            if not wrong:
                return
            fewest = min(fewest, wrong, key=len)
        raise UserError(f"{fewest[0].where}: label {fewest[0].label!r} names none of the {len(fewest[0].inputs[2])} "
                        "options: the labels of a set must all count from 0, from 1 or from A")

    def items(self, examples: list[Example]) -> list[Item]:
        pairs = [(context, question + option) for e in examples for context, question, options in [e.inputs]
                 for option in options]
        sequences = iter(self.encode_texts(pairs))
        return [Item(i, [next(sequences) for _ in e.inputs[2]], None if e.label is None else self.label_ids[e.label])
                for i, e in enumerate(examples)]

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"n_options": tuple(len(item.sequences) for item in items)}
        if all(item.target is not None for item in items):
            arguments["labels"] = torch.tensor([item.target for item in items])
        return arguments

    def outputs(self, out: Any, items: list[Item]) -> list[np.ndarray]:
        return [o[: len(item.sequences)] for o, item in zip(super().outputs(out, items), items)]

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        named = lambda i: self.labels[i] if i < len(self.labels) else i
        return [{"choice": named(int(o.argmax())),
                 "scores": [round(float(p), 6) for p in _softmax(o)]} for o in outputs]

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        return {"accuracy": float(np.mean([e.label == p["choice"] for e, p in zip(examples, predictions)]))}

    def shown(self, example: Example) -> dict[str, str]:
        context, question, options = example.inputs
        return {"text": context, "question": question.strip(),
                "options": " | ".join(f"{name}: {o}" for name, o in zip(self.labels, options)),
                "label": str(example.label)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()
