"""What a task is: rows -> examples -> items (token sequences and a target) -> packed batches -> predictions -> metrics.

`Task` holds what all of them share; each family fills in the rest in a file of its own. A task reads files, so a fault
in them is a UserError with file and line; what it decides by itself is counted in `counts`, and printed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tokenizers
import torch

from bertfast.batch import PackedBatch
from bertfast.checkpoint import Checkpointed
from bertfast.config import BertConfig
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError
from bertfast.finetune.batches import Item, Sequence, pack, rounded, sequence
from bertfast.finetune.read import NAMED, Row, Table, open_table
from bertfast.heads import BertForFeatures
from bertfast.model import useful_flops
from bertfast.step_graph import Call, on_device

NAMES = {  # role -> the column names it is known by, the likeliest first; compared in lower case
    "text": ("sentence1", "premise", "question1", "#1 string", "text1", "text", "context", "question", "sentence",
             "goal", "query", "review", "utterance", "content"),
    "text_pair": ("sentence2", "hypothesis", "question2", "#2 string", "text2", "text_pair", "question", "sentence"),
    "label": ("label", "labels", "class", "category", "intent", "score", "quality", "gold_label", "similarity",
              "target", "answer"),
    "words": ("tokens", "words", "form", "token", "word", "1", "text", "sentence"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels", "upos", "tag", "ner", "pos", "label"),
    "context": ("context", "passage", "paragraph"),
    "question": ("question", "query"),
    "answers": ("answers", "answer"),
    "source": ("source", "input", "mr", "text", "document", "article"),
    "target": ("target", "output", "ref", "summary", "highlights", "reference"),
}
OPTIONS = {  # what the command line calls a role, where that is not its own name
    "words": "text", "context": "text", "source": "text", "question": "text_pair", "tags": "label",
    "answers": "label", "target": "label",
}


@dataclass
class Settings:
    """What defines a fine-tuning; stored in the run and in its checkpoint, where `predict` reads how to read."""

    task: str
    model: str
    train: str
    dev: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    choices: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    multi_label: bool = False
    label_separator: str = ","
    symmetric: bool = False
    characters: bool = False
    max_length: int | None = None  # tokens of a sequence; None: the task's habit
    stride: int = 128  # tokens that neighbouring windows of a long text share
    max_answer_length: int = 30
    epochs: float = 3.0
    steps: int | None = None  # instead of epochs
    batch_size: int = 32  # examples a step
    tokens: int = 4096  # token budget of one packed batch; a step takes as many as it needs
    lr: float | None = None  # None: LEARNING_RATES
    warmup: float = 0.1
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    max_grad_norm: float = 1.0
    dropout: float | None = None
    freeze: str = "none"
    features: bool = False
    static: bool = False  # of the word table alone
    style: str = "encoder-decoder"  # or prefix-lm (seq2seq)
    max_target_length: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    precision: str = "auto"
    metric: str | None = None
    eval_every: int | None = None
    patience: int = 0
    seed: int = 1
    seeds: int = 1
    log_every: int = 10
    cuda_graph: bool = True  # on a GPU, replay steps whose shapes recur


LEARNING_RATES = {False: 5e-5, True: 5e-3}  # of a whole model, and of a head on cached features


class Example(NamedTuple):
    """A row as the task understands it: where it stands, what goes in, what should come out (None: not known)."""

    where: str
    inputs: Any
    label: Any


class Task:
    """The steps from rows to metrics; see the subclasses.

    head: the model class. roles: what columns it reads, the label's last. metrics: names, the one that decides first.
    """

    head: type[Checkpointed]
    roles: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()  # roles that need no column
    metrics: tuple[str, ...]
    default_length: ClassVar[int] = 512
    named_outputs: ClassVar[bool] = True  # whether the head's outputs are the labels
    feature_rows: ClassVar[str] = "sequences"  # what --features mixes: see BertForFeatures; "" where it can't

    def __init__(self, settings: Settings, tokenizer: Tokenizer, max_positions: int, labels: list[str] | None = None):
        """labels: of a trained task; else `learn` finds them."""
        self.settings, self.tokenizer, self.max_positions = settings, tokenizer, max_positions
        self.labels = labels or []
        self.label_ids = {label: i for i, label in enumerate(self.labels)}
        self.max_length = min(settings.max_length or self.default_length, max_positions)
        if settings.max_length and settings.max_length > max_positions:
            raise UserError(f"--max-length {settings.max_length}: the model has {max_positions} positions")
        if self.max_length < 8:
            raise UserError(f"--max-length {self.max_length} leaves no room for words")
        if settings.features:
            if not self.feature_rows:
                raise UserError(f"--features is not for {settings.task}: a linear head cannot write text")
            self.head = BertForFeatures
        self.counts: Counter[str] = Counter()  # decisions: sentence -> how often
        self.read_roles: list[str] | None = None  # what the training file gave, labels apart
        self.read_columns: dict[str, Any] = {}  # and in which columns: role -> name ("choices": names)
        self.read_format: str | None = None  # Table.format

    # ---- rows

    def open(self, path: str | Path, columns: list[str] | None = None) -> Table:
        """A file of examples. columns: names for one without header, if they differ from the training file's."""
        return open_table(path, columns or self.settings.columns or None)

    def find_columns(self, table: Table, labelled: bool = True) -> dict[str, str]:
        """Role -> column, by the names given, the training file's or the usual ones.

        Raises UserError that lists the table's columns.
        """
        found: dict[str, str] = {}
        named = {role: getattr(self.settings, OPTIONS.get(role, role)) for role in self.roles}
        for role in self.roles:
            given, trained = named[role], self.read_columns.get(role)
            if given:
                column = given if given in table.columns else None
            elif trained in table.columns:  # a likelier name may stand beside it
                column = trained
            else:
                taken = [*found.values(), *self.read_columns.values(), *named.values()]
                lower = {c.lower(): c for c in reversed(table.columns) if c not in taken}
                column = next((lower[name] for name in NAMES[role] if name in lower), None)
            if column in found.values():
                both = " and ".join(r.replace("_", " ") for r in (*found, role) if found.get(r, column) == column)
                raise UserError(f"{table.path}: column {column!r} cannot be both {both}")
            if column:
                found[role] = column
            elif (given or role not in self.optional) and (labelled or role != self.roles[-1]):
                option = "--" + OPTIONS.get(role, role).replace("_", "-")
                headerless = not (given or self.settings.columns or table.path.suffix.lower() in NAMED)
                raise UserError(
                    (f"{table.path} has no column {given!r}" if given
                     else f"{table.path}: which column holds the {role.replace('_', ' ')}? "
                     + (f"In training it was {trained!r}" if trained else f"Name it with {option}"))
                    + f"; there are: {', '.join(table.columns)}"
                    + (" (no header? Name the columns with --columns)" if headerless else "")
                )
        return found

    def as_in_training(self, table: Table, columns: dict[str, str]) -> dict[str, str]:
        """The columns, less those of roles that the training file lacked. Raises UserError where it had more."""
        if self.read_roles is None:
            self.read_roles = [role for role in self.roles[:-1] if role in columns]
            self.read_columns |= columns
            self.read_format = table.format
        missing = [role for role in self.read_roles if role not in columns]
        if missing:
            there = f"{missing[0].replace('_', ' ')}, {self.read_columns[missing[0]]!r}"
            raise UserError(f"{table.path}: the training file has a {there}, this one does not, or under another name; "
                            f"there are: {', '.join(table.columns)}")
        return {role: c for role, c in columns.items() if role in (*self.read_roles, self.roles[-1])}

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        """Raises UserError, with the row's place, for a row that cannot be used."""
        raise NotImplementedError

    def group(self, example: Example) -> Any:
        """What must not stand on both sides of a split: the example itself, or the text it shares with others."""
        return example.where

    def gathered(self, examples: list[Example]) -> list[Example]:
        """The dev examples as they are judged."""
        return examples

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        """Find the labels (and what else the data decides) before the first item is made."""

    # ---- items, batches, outputs

    def items(self, examples: list[Example]) -> list[Item]:
        raise NotImplementedError

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        """What the head takes besides the packed batch; labels where all items have a target."""
        return {}

    def n_features(self, item: Item) -> int:
        """Rows of what --features caches for an item."""
        return len(item.sequences)

    def n_targets(self, items: list[Item]) -> int:
        """What a step's loss is divided by."""
        return len(items)

    def call(self, items: list[Item], first: int = 0, replayed: bool = False) -> Call:
        """What the head is called with, on the host: items packed into one batch, or their cached features.

        first: index in the step of their first sequence; replayed: with shapes that recur.
        """
        cached = [item.features for item in items if item.features is not None]
        if cached:
            return torch.cat(cached), self.forward_arguments(items)
        sequences = [s for item in items for s in item.sequences]
        return self.packed(sequences, first, replayed), self.forward_arguments(items)

    def packed(self, sequences: list[Sequence], first: int, replayed: bool) -> PackedBatch:
        """Sequences in one batch; first and replayed as for `call`."""
        batch = pack(sequences, first)
        return rounded(batch, self.max_positions) if replayed else batch

    def forward(self, model, items: list[Item]) -> Any:
        """The head's output for items, all in one batch."""
        batch, arguments = on_device(self.call(items), next(model.parameters()).device)
        return model(batch, **arguments)

    def flops(self, config: BertConfig, batch: PackedBatch) -> float:
        """FLOPs of a training step on a batch that the result needs; 0 where they are not counted."""
        return useful_flops(config, batch)

    def infer(self, model, items: list[Item]) -> list[np.ndarray]:
        """What `predictions` reads, for each item."""
        return self.outputs(self.forward(model, items), items)

    def outputs(self, out: Any, items: list[Item]) -> list[np.ndarray]:
        """The head's output for each item, on the host."""
        return list(out.logits.float().cpu().numpy())

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        """One JSON object an example, in order."""
        raise NotImplementedError

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        raise NotImplementedError

    def configure(self, config: BertConfig) -> None:
        """What the checkpoint's config.json says about the head, in transformers' words."""
        for name in ("id2label", "label2id", "num_labels", "problem_type", "features", "static"):  # an earlier task's
            config.extra.pop(name, None)
        if self.settings.features:
            config.extra["features"] = self.feature_rows
            config.extra |= {"static": True} if self.settings.static else {}
        if not self.named_outputs:
            return
        config.extra["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
        config.extra["label2id"] = dict(self.label_ids)

    def gold(self, example: Example) -> Any:
        """What predictions.jsonl shows beside the prediction."""
        return example.label

    # ---- shared by the families

    def shown(self, example: Example) -> dict[str, str]:
        """An example as the user should see it, before training starts."""
        raise NotImplementedError

    def encoder(self, stride: int = 0, strategy: str = "longest_first") -> tokenizers.Tokenizer:
        """The tokenizer's backend, cutting at max_length; what overflows is kept in windows that share `stride`."""
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
        backend.enable_truncation(self.max_length, stride=stride, strategy=strategy)
        return backend

    def encode_texts(self, texts: list) -> list[Sequence]:
        """Texts, or (text, pair) tuples, as sequences cut to max_length, longest part first."""
        sequences = []
        for encoding in self.encoder().encode_batch(texts):
            if encoding.overflowing:
                self.counts[f"texts cut to {self.max_length} tokens (--max-length)"] += 1
            sequences.append(sequence(encoding))
        return sequences

    def set_labels(self, train: Iterable[tuple[str, str]], dev: Iterable[tuple[str, str]]) -> None:
        """Labels from (label, place) pairs: numbers in numeric order, words in alphabetic.

        One that only occurs in dev stays in the set, counts as wrong, and is told. Raises UserError for fewer than 2.
        """
        known = {label for label, _ in train}
        unseen: dict[str, tuple[int, str]] = {}
        for label, where in dev:
            if label not in known:
                unseen[label] = (unseen.get(label, (0, ""))[0] + 1, unseen.get(label, (0, where))[1])
        for label, (n, where) in unseen.items():
            self.counts[f"dev examples with label {label!r}, which training never sees (first: {where})"] += n
        names = known | set(unseen)
        if len(known) < 2:
            raise UserError(f"{self.settings.train} has only one label ({', '.join(known)}): nothing to learn")
        numeric = all(re.fullmatch(r"-?\d+", name) for name in names)
        self.labels = sorted(names, key=(lambda name: (int(name), name)) if numeric else None)
        self.label_ids = {label: i for i, label in enumerate(self.labels)}


def require_text(row: Row, column: str) -> str:
    """The text in a column. Raises UserError where it is something else."""
    value = row.values.get(column)
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {column} is {'missing' if value is None else f'{value!r}, not text'}")
    return value
