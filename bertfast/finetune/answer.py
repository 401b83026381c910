"""Question answering: where in a text the answer begins and ends, or that there is none (SQuAD v1 and v2).

[CLS] question [SEP] context [SEP]; a long context is read in windows that overlap by `stride` tokens, each an item of
its own, whose target is [CLS] where the answer lies elsewhere. From all windows the best spans compete by the sum of
their start and end logits; "no answer" scores as [CLS] does, at its lowest over the windows (Devlin et al. 2019).
"""

import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bertfast.batch import PackedBatch
from bertfast.config import BertConfig
from bertfast.files import UserError
from bertfast.finetune import metrics
from bertfast.finetune.batches import Item, sequence
from bertfast.finetune.read import Row
from bertfast.finetune.task import Example, Task, require_text
from bertfast.heads import BertForQuestionAnswering

N_BEST = 20


class Answering(Task):
    """Rows with context, question and answers {"text": […], "answer_start": […]} (in characters)."""

    head = BertForQuestionAnswering
    roles = ("context", "question", "answers")
    metrics = ("f1", "exact_match")
    default_length = 384
    named_outputs = False
    feature_rows = "rows"

    def __init__(self, settings, tokenizer, max_positions, labels=None):
        super().__init__(settings, tokenizer, max_positions, labels)
        self.stride = min(settings.stride, self.max_length // 3)  # the longest question leaves a context half

    def example(self, row: Row, columns: dict[str, str], labelled: bool = True) -> Example:
        context, question = require_text(row, columns["context"]), require_text(row, columns["question"])
        inputs = (str(row.values.get("id", "")), question.strip(), context)
        if not labelled:
            return Example(row.where, inputs, None)
        answers = row.values.get(columns["answers"])
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
            raise UserError(f'{row.where}: answers must be {{"text": […], "answer_start": […]}}, got {answers!r}')
        starts, texts = answers["answer_start"], answers["text"]
        if not (isinstance(starts, list) and isinstance(texts, list) and len(starts) == len(texts)
                and all(isinstance(s, int) for s in starts) and all(isinstance(t, str) for t in texts)):
            raise UserError(f"{row.where}: answers needs a list of texts and as many whole numbers, got {answers!r}")
        spans = [(s, t) for s, t in map(_bare, starts, texts) if t]
        for start, text in spans[:1]:
            if context[start : start + len(text)] != text:
                raise UserError(f"{row.where}: the answer {text[:40]!r} is not at character {start} of its context")
        return Example(row.where, inputs, [] if row.values.get("is_impossible") else spans)

    def group(self, example: Example) -> str:
        return example.inputs[2]

    def learn(self, train: list[Example], dev: list[Example]) -> None:
        self.labels = ["answers"] + (["no answer"] if any(not e.label for e in train) else [])

    def items(self, examples: list[Example]) -> list[Item]:
        longest = self.max_length // 2  # a question that leaves no room for a context is cut
        questions = []
        for encoding, e in zip(self.tokenizer.backend.encode_batch([e.inputs[1] for e in examples]), examples):
            question = e.inputs[1]
            if len(encoding.ids) > longest:
                self.counts[f"questions cut to {longest} tokens"] += 1
                question = question[: encoding.offsets[longest - 2][1]]
            questions.append(question)
        encodings = self.encoder(self.stride, "only_second").encode_batch(
            [(q, e.inputs[2]) for q, e in zip(questions, examples)]
        )
        return [item for i, pair in enumerate(zip(examples, encodings)) for item in self._windows(i, *pair)]

    def _windows(self, index: int, example: Example, encoding) -> list[Item]:
        items = []
        after = _past_marks(example.inputs[2])
        for part in [encoding, *encoding.overflowing]:
            one = sequence(part)
            offsets = np.array(part.offsets, np.int32)
            begin, end = one.second, len(one.ids) - 1  # the context's rows
            offsets[begin:end, 1] = after[offsets[begin:end, 1]]
            target = None
            if example.label is not None:
                target = (0, 0)
                if example.label:
                    start, text = example.label[0]
                    target = _rows_of(offsets, begin, end, start, start + len(text))
            items.append(Item(index, [one], target, (offsets, begin, end)))
        if example.label and all(item.target == (0, 0) for item in items):
            self.counts[f"answers that no window of {self.max_length} tokens holds: training takes them for none"] += 1
        if len(items) > 1:
            self.counts[f"contexts of more than {self.max_length} tokens, read in windows that share {self.stride} "
                        "(--stride)"] += 1
        return items

    def forward_arguments(self, items: list[Item]) -> dict[str, Any]:
        arguments = {}
        if self.settings.features:
            arguments["lengths"] = torch.tensor([item.n_tokens for item in items])
        if all(item.target is not None for item in items):
            start, end = torch.tensor([item.target for item in items]).unbind(1)
            arguments |= {"start_positions": start, "end_positions": end}
        return arguments

    def n_features(self, item: Item) -> int:
        return item.n_tokens

    def flops(self, config: BertConfig, batch: PackedBatch) -> float:
        return super().flops(config, replace(batch, cu_seqlens_read=batch.cu_seqlens))  # all rows are read

    def outputs(self, out: Any, items: list[Item]) -> list[np.ndarray]:
        rows = torch.stack([out.start_logits, out.end_logits], 1).float().cpu().numpy()
        return np.split(rows, np.cumsum([item.n_tokens for item in items])[:-1])

    def predictions(self, examples: list[Example], items: list[Item], outputs: list[np.ndarray]) -> list[dict]:
        best: list[list[tuple[float, int, int]]] = [[] for _ in examples]  # (score, first character, last)
        null = [np.inf] * len(examples)
        for item, logits in zip(items, outputs):
            offsets, begin, end = item.extra
            null[item.example] = min(null[item.example], float(logits[0].sum()))
            best[item.example] += [
                (score, int(offsets[i, 0]), int(offsets[j, 1]))
                for score, i, j in _best_spans(logits, begin, end, self.settings.max_answer_length)
            ]
        results = []
        for example, spans, none in zip(examples, best, null):
            identity, _, context = example.inputs
            ranked: dict[str, float] = {}
            for score, start, end in sorted(spans, reverse=True):
                ranked.setdefault(context[start:end], score)
            if "no answer" in self.labels or not ranked:
                ranked[""] = none
            top = sorted(ranked.items(), key=lambda pair: -pair[1])[:N_BEST]
            weights = np.exp(np.array([score for _, score in top]) - top[0][1])
            n_best = [{"text": text, "score": round(float(w), 6)} for (text, _), w in zip(top, weights / weights.sum())]
            results.append({"id": identity, "answer": top[0][0], "n_best": n_best[:5]})
        return results

    def score(self, examples: list[Example], predictions: list[dict]) -> dict[str, float]:
        return metrics.answers([self.gold(e) for e in examples], [p["answer"] for p in predictions])

    def gold(self, example: Example) -> list[str]:
        return [text for _, text in example.label]

    def shown(self, example: Example) -> dict[str, str]:
        _, question, context = example.inputs
        return {"question": question, "context": context,
                "answer": " | ".join(dict.fromkeys(text for _, text in example.label)) or "(none)"}


def _bare(start: int, text: str) -> tuple[int, str]:
    """An answer without the spaces and invisible characters at its ends, which belong to no token."""
    seen = [i for i, c in enumerate(text)
            if not c.isspace() and c != "\ufffd" and unicodedata.category(c) not in ("Cc", "Cf", "Co")]
    return (start + seen[0], text[seen[0] : seen[-1] + 1]) if seen else (start, "")


def _rows_of(offsets: np.ndarray, begin: int, end: int, first: int, last: int) -> tuple[int, int]:
    """The rows in [begin, end) of the tokens with characters first to last; (0, 0) where those lie elsewhere."""
    starts, ends = offsets[begin:end, 0], offsets[begin:end, 1]
    if not len(starts) or starts[0] > first or ends[-1] < last:
        return 0, 0
    # several rows may hold one character (Hangul without accents is taken apart), and no row an unreadable one
    start, stop = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(starts, last))
    return (begin + start, begin + stop - 1) if start < stop else (0, 0)


def _past_marks(text: str) -> np.ndarray:
    """(n + 1,): each position, moved past the combining marks there: an uncased model's tokens end before them."""
    after = np.arange(len(text) + 1, dtype=np.int32)
    for i in range(len(text) - 1, -1, -1):
        if unicodedata.category(text[i]) == "Mn":
            after[i] = after[i + 1]
    return after


def _best_spans(logits: np.ndarray, begin: int, end: int, longest: int) -> list[tuple[float, int, int]]:
    """The N_BEST spans (score, first row, last row) of the context's rows, from the N_BEST starts and ends."""
    starts = begin + np.argsort(-logits[begin:end, 0], kind="stable")[:N_BEST]
    ends = begin + np.argsort(-logits[begin:end, 1], kind="stable")[:N_BEST]
    length = ends - starts[:, None] + 1
    scores = np.where((length >= 1) & (length <= longest), logits[starts, 0][:, None] + logits[ends, 1], -np.inf)
    chosen = np.argsort(-scores, axis=None, kind="stable")[:N_BEST]
    return [(float(scores.flat[c]), int(starts[c // len(ends)]), int(ends[c % len(ends)]))
            for c in chosen if np.isfinite(scores.flat[c])]
