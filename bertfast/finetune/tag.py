"""Tagging: a label a word, read at the word's first piece (Devlin et al. 2019). POS, NER, chunks, word segmentation.

A sentence longer than max_length is cut into windows that overlap by `stride` tokens; each word is read in the window
where it stands furthest from an edge, so nothing is lost and nothing is counted twice.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from bertfast.files import UserError
from bertfast.finetune import metrics
from bertfast.finetune.batches import Item, sequence
from bertfast.finetune.read import PLAIN, Row, Table, open_table
from bertfast.finetune.task import Example, Task
from bertfast.heads import BertForTokenClassification
from bertfast.ops.masked_vocab_projection import IGNORE_INDEX


class Tagging(Task):
    """Words -> tags. With `characters`, words are taken apart and each character learns whether it begins a word."""

    head = BertForTokenClassification
    roles = ("words", "tags")
    feature_rows = "tokens"

    def __init__(self, settings, tokenizer, max_positions, labels=None):
        super().__init__(settings, tokenizer, max_positions, labels)
        self.stride = min(settings.stride, (self.max_length - 2) // 2)
        self._decide_metrics()

    def _decide_metrics(self) -> None:
        self.spans = bool(self.labels) and all(re.fullmatch(r"O|[BIESLU]-.*|B|I", t) for t in self.labels)
        self.metrics = ("f1", "precision", "recall", "accuracy") if self.spans else ("accuracy",)

    def open(self, path: str | Path, columns: list[str] | None = None) -> Table:
        """Also a word a line. A .tsv or .txt is read as the training file was, if that was one and this can be."""
        names = columns or self.settings.columns or None
        if self.read_format and all(Path(p).suffix.lower() in PLAIN for p in (path, self.settings.train)):
            with suppress(UserError):
                table = open_table(path, names, words=True, format=self.read_format)
                column = self.find_columns(table, labelled=False)["words"]
                read = (row.values[column] for row in table)
                if all(isinstance(words, str) or " " not in "".join(words) for words in read):  # no sentences as words
                    return table
        return open_table(path, names, words=True)

    def find_columns(self, table: Table, labelled: bool = True) -> dict[str, str]:
        """In files of bare columns the word is the first and the tag the last, unless --label or training says."""
        if self.settings.characters:
            return super().find_columns(table, labelled=False)
        numbered = table.columns == [str(i) for i in range(1, len(table.columns) + 1)]
        if numbered and not self.settings.label and len(table.columns) > 1:
            tags = self.read_columns.get("tags")
            return {"words": self.settings.text or "1", "tags": tags if tags in table.columns else table.columns[-1]}
        return super().find_columns(table, labelled)

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        words = row.values.get(columns["words"])
        if isinstance(words, str):
            words = words.split()
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise UserError(f"{row.where}: {columns['words']} is not a list of words")
        if not words:
            self.counts["sentences without a word"] += 1
        if self.settings.characters:
            words = list(filter(None, words))
            tags = [tag for word in words for tag in ["B-WORD", *["I-WORD"] * (len(word) - 1)]]
            return Example(row.where, list("".join(words)), tags if labelled else None)
        if not labelled:
            return Example(row.where, words, None)
        given = row.values.get(columns["tags"])
        given = given.split() if isinstance(given, str) else given
        if not isinstance(given, list) or any(t is None for t in given):
            raise UserError(f"{row.where}: {columns['tags']} is not a list of tags: {given!r}")
        tags = [str(t) for t in given]
        if len(tags) != len(words):
            raise UserError(f"{row.where}: {len(words)} words, but {len(tags)} tags")
        if "" in tags:
            raise UserError(f"{row.where}: word {tags.index('') + 1} has no tag")
        return Example(row.where, words, self._iob2(tags))

    def _iob2(self, tags: list[str]) -> list[str]:
        """IOB1, where a span begins with I- unless it follows one of its kind, as IOB2, where B- always begins it."""
        out, previous = [], "O"
        for tag in tags:
            if tag.startswith("I-") and previous[2:] != tag[2:]:
                self.counts["span beginnings marked I- read as B- (IOB1 -> IOB2)"] += 1
                out.append("B" + tag[1:])
            else:
                out.append(tag)
            previous = tag
        return out

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        each = lambda examples: ((tag, e.where) for e in examples for tag in e.label)
        self.set_labels(each(train), each(dev))
        tags = [tag for e in train for tag in e.label]
        if self.read_format == "CoNLL" and tags.count(tags[0]) == 1:
            self.counts[f"tag {tags[0]!r}, on the first line alone (a header? Name the columns with --columns)"] = 1
        self._decide_metrics()
        if self.spans:
            metrics.need("seqeval.metrics")

    def items(self, examples: list[Example]) -> list[Item]:
        encoder = self.encoder(self.stride)
        return [item for i, example in enumerate(examples) for item in self._windows(i, example, encoder)]

    def _windows(self, index: int, example: Example, encoder: tokenizers.Tokenizer) -> list[Item]:
        encoding = encoder.encode(example.inputs, is_pretokenized=True)
        whole = [encoding, *encoding.overflowing]
        seen = {w for part in whole for w in part.word_ids if w is not None}
        if len(seen) < len(example.inputs):  # words of nothing but control characters
            self.counts["words without a readable character, read as [UNK]"] += len(example.inputs) - len(seen)
            words = [w if i in seen else "[UNK]" for i, w in enumerate(example.inputs)]
            encoding = encoder.encode(words, is_pretokenized=True)
            whole = [encoding, *encoding.overflowing]
        if len(whole) > 1:
            self.counts[f"sentences of more than {self.max_length} tokens, read in windows that share {self.stride} "
                        "(--stride)"] += 1
        home: dict[int, tuple[int, int, int]] = {}  # word -> (distance to the nearer edge, window, position)
        for number, part in enumerate(whole):
            previous = whole[number - 1].word_ids[-2 - self.stride] if number else None  # perhaps cut in two here
            last = len(part.ids) - 1
            for position, word in enumerate(part.word_ids):
                if word is not None and word != previous:
                    left = position if number else last  # the text's own edges are none
                    right = last - position if number < len(whole) - 1 else last
                    home[word] = max(home.get(word, (-1, 0, 0)), (min(left, right), number, position))
                previous = word if word is not None else previous
        items = []
        for number, part in enumerate(whole):
            own = [w for w in sorted(home) if home[w][1] == number]
            labels = [self.label_ids[example.label[w]] if example.label else IGNORE_INDEX for w in own]
            if own:
                items.append(Item(index, [sequence(part, [home[w][2] for w in own], labels)], None, own))
        return items

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        if items[0].features is None:
            return {}  # the packed batch has them
        return {"labels": torch.from_numpy(np.concatenate([s.labels for item in items for s in item.sequences]))}

    def n_features(self, item: Item) -> int:
        return sum(len(s.reads) for s in item.sequences)

    def n_targets(self, items: list[Item]) -> int:
        return sum(len(item.extra) for item in items)

    def outputs(self, out: Any, items: list[Item]) -> list[np.ndarray]:
        rows = out.logits.float().argmax(-1).cpu().numpy()
        return np.split(rows, np.cumsum([len(item.extra) for item in items])[:-1])

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        tags: list[list[str]] = [[""] * len(e.inputs) for e in examples]
        for item, output in zip(items, outputs):
            for word, label in zip(item.extra, output):
                tags[item.example][word] = self.labels[label]
        if not self.settings.characters:
            return [{"tokens": e.inputs, "tags": t} for e, t in zip(examples, tags)]
        return [{"words": self._joined(e.inputs, t), "tokens": e.inputs, "tags": t} for e, t in zip(examples, tags)]

    def _joined(self, characters: list[str], tags: list[str]) -> list[str]:
        words: list[str] = []
        for character, tag in zip(characters, tags):
            if words and tag.startswith("I"):
                words[-1] += character
            else:
                words.append(character)
        return words

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        gold, guess = [e.label for e in examples], [p["tags"] for p in predictions]
        return metrics.spans(gold, guess) if self.spans else metrics.tags(gold, guess)

    def shown(self, example: Example) -> dict[str, str]:
        return {"words": " ".join(example.inputs), "tags": " ".join(example.label)}
