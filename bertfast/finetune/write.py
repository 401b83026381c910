"""Text to text: a source is read, a target written, piece by piece; the two styles are those of bertfast.seq2seq.

Judged by what it writes: BLEU and ROUGE-L of the decoded text against all references of a source, both spelled as the
tokenizer spells them (an uncased model cannot know capitals, nor whether a hyphen stood between spaces). Words that the
vocabulary lacks stay in a reference: a model that cannot write them is charged for it.
"""

from typing import Any

import numpy as np
import torch

from bertfast.batch import PackedBatch
from bertfast.config import BertConfig
from bertfast.finetune import metrics
from bertfast.finetune.batches import Item, Sequence, pack
from bertfast.finetune.read import Row
from bertfast.finetune.task import Example, Task, require_text
from bertfast.seq2seq import BertForPrefixLM, BertForSeq2Seq, generate
from bertfast.step_graph import Call

ROOM = 8  # keys and values that decoding keeps at once in each layer, in token budgets


class Writing(Task):
    """Source -> target; an example of the dev set has all targets of its source."""

    roles = ("source", "target")
    metrics = ("bleu", "rouge_l")
    named_outputs = False
    feature_rows = ""

    def __init__(self, settings, tokenizer, max_positions, labels=None):
        super().__init__(settings, tokenizer, max_positions, labels)
        self.prefix = settings.style == "prefix-lm"
        self.head = BertForPrefixLM if self.prefix else BertForSeq2Seq
        room = max_positions // 2 if self.prefix else max_positions - 1  # with [SEP], without [CLS]
        self.longest = min(settings.max_target_length, room)
        if self.longest < settings.max_target_length:
            self.counts[f"tokens of a target at most, not {settings.max_target_length}: the model has {max_positions} "
                        "positions"] = self.longest
        if self.prefix:  # source and target share the positions
            self.max_length = min(self.max_length, max_positions - self.longest)
            if settings.max_length and self.max_length < settings.max_length:
                self.counts[f"tokens of a source at most, not {settings.max_length}: the target has the other "
                            "positions"] = self.max_length

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        metrics.need("sacrebleu")
        metrics.need("rouge_score.rouge_scorer")

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        target = [require_text(row, columns["target"])] if labelled else None
        if target and not target[0].strip():
            self.counts["rows with an empty target, kept"] += 1
        return Example(row.where, (require_text(row, columns["source"]),), target)

    def group(self, example: Example) -> str:
        return example.inputs[0]

    def gathered(self, examples: list[Example]) -> list[Example]:
        """Dev examples with the same source as one, with all its targets as references."""
        by_source: dict[str, Example] = {}
        for example in examples:
            first = by_source.setdefault(example.inputs[0], example._replace(label=[]))
            first.label.extend(example.label)
        if len(by_source) < len(examples):
            self.counts["dev rows whose source occurred before: further references of it"] = (
                len(examples) - len(by_source)
            )
        unknown = sum(self.tokenizer.unk_id in ids for ids in self._ids([e.label[0] for e in examples]))
        if unknown:
            self.counts["dev references with words that the vocabulary lacks, which no prediction writes"] = unknown
        return list(by_source.values())

    def items(self, examples: list[Example]) -> list[Item]:
        sources = self.encode_texts([e.inputs[0] for e in examples])
        targets = [e.label[0] if e.label else "" for e in examples]
        return [Item(i, *self._joined(source, e, target))
                for i, (source, e, target) in enumerate(zip(sources, examples, self._ids(targets)))]

    def _ids(self, targets: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.backend.encode_batch(targets, add_special_tokens=False)]

    def _joined(self, source: Sequence, example: Example, target: list[int]) -> tuple[list[Sequence], Any]:
        """The sequences the head reads, and what it is to write ((n,) ids with [SEP]), None where it isn't known."""
        if example.label is None:
            return [source], None
        if len(target) >= self.longest:
            self.counts[f"targets cut to {self.longest} tokens (--max-target-length)"] += 1
        written = np.array([*target[: self.longest - 1], self.tokenizer.sep_id], np.int64)
        if not self.prefix:
            return [source], written
        ids = np.concatenate([source.ids, written[:-1]]).astype(np.int32)
        reads = np.arange(len(source.ids) - 1, len(ids))
        return [Sequence(ids, len(source.ids), reads, written)], written

    def n_targets(self, items: list[Item]) -> int:
        return sum(len(item.target) for item in items)

    def call(self, items: list[Item], first: int = 0, replayed: bool = False) -> Call:
        batch, _ = super().call(items, first, replayed)
        if self.prefix:
            seen = torch.tensor([item.sequences[0].second for item in items], dtype=torch.int32)
            return batch, {"prefix_lens": seen}
        begun = [np.concatenate([[self.tokenizer.cls_id], item.target[:-1]]) for item in items]
        read = [Sequence(ids, len(ids), np.arange(len(ids)), item.target) for ids, item in zip(begun, items)]
        targets = self.packed(read, first, replayed)
        return batch, {"targets": targets, "labels": targets.labels}

    def flops(self, config: BertConfig, batch: PackedBatch) -> float:
        return 0.0

    def infer(self, model, items: list[Item]) -> list[np.ndarray]:
        sources = [Sequence(s.ids[: s.second], s.second) for item in items for s in item.sequences]
        device = next(model.parameters()).device
        room = self.longest + max(s.second for s in sources)
        at_once = max(1, ROOM * self.settings.tokens // (self.settings.beams * room))
        written: list[list[int]] = []
        for begin in range(0, len(sources), at_once):
            batch = pack(sources[begin : begin + at_once]).to(device)
            written += generate(model, batch, self.tokenizer.cls_id, self.tokenizer.sep_id, self.longest,
                                self.settings.beams, self.settings.length_penalty)
        return [np.array(ids, np.int64) for ids in written]

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        return [{"text": self.tokenizer.decode(ids.tolist())} for ids in outputs]

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        references = [[self._spelled(text) for text in e.label] for e in examples]
        return metrics.texts(references, [p["text"] for p in predictions])

    def _spelled(self, text: str) -> str:
        """A reference as a prediction would spell it; decoding drops [UNK], so the words it stands for are kept."""
        encoding = self.tokenizer.backend.encode(text, add_special_tokens=False)
        parts, begin = [], 0
        for i, (token, (first, last)) in enumerate(zip(encoding.ids, encoding.offsets)):
            if token == self.tokenizer.unk_id:
                parts += [self.tokenizer.decode(encoding.ids[begin:i]), text[first:last]]
                begin = i + 1
        return " ".join([*parts, self.tokenizer.decode(encoding.ids[begin:])])

    def configure(self, config: BertConfig) -> None:
        super().configure(config)
        config.extra.update(decoder_start_token_id=self.tokenizer.cls_id, eos_token_id=self.tokenizer.sep_id)

    def shown(self, example: Example) -> dict[str, str]:
        return {"source": example.inputs[0], "target": example.label[0]}
