"""Fine-tuning: samples a second of ours and of the usual transformers loop, on any task and data that we read.

The peer pads to the longest of a batch and steps with AdamW, clipping and a schedule, its loop written out: the
Trainer's bookkeeping would only slow it. It reads our token ids and starts from our weights, so that what differs is
the engine.
The contenders take turns of `window` seconds; the losses of their first steps, dropout off, must agree. "bertfast
features" trains another model, a head on cached features, where the task has one.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from bertfast.benchmarks import contest, pretrain
from bertfast.benchmarks.contest import Contender, Outcome

from bertfast.finetune.batches import Item, by_budget
from bertfast.finetune.task import Settings
from bertfast.finetune.tasks import TASKS
from bertfast.finetune.train import FineTuning, Window

PEERS = {"classification": "BertForSequenceClassification", "regression": "BertForSequenceClassification",
         "tagging": "BertForTokenClassification", "qa": "BertForQuestionAnswering",
         "multiple-choice": "BertForMultipleChoice", "seq2seq": "EncoderDecoderModel"}


class Peer:
    """transformers' model for a task on our items: the usual loop."""

    def __init__(self, work: FineTuning, bf16: bool = False):
        import transformers

        torch.manual_seed(work.settings.seed)
        self.work, self.task, self.device, self.bf16 = work, work.task, work.device, bf16
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
        if work.settings.dropout is not None:
            for module in self.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = work.settings.dropout
        self.model.to(self.device).train()
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
                begin, end = torch.tensor([item.target for item in items], device=self.device).unbind(1)
                batch.update(start_positions=begin, end_positions=end)
            else:
                batch["labels"] = torch.from_numpy(np.array([item.target for item in items])).to(self.device)
        return batch

    def _padded(self, rows: list, value: int) -> torch.Tensor:
        tensors = [torch.from_numpy(np.asarray(row, np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(self.device)

    def step(self, items: list[Item], lr: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.inputs(items)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.work.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

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
                rows = out.logits.argmax(-1).cpu().numpy()
                outputs += [row[item.sequences[0].reads] for row, item in zip(rows, items)]
            elif work.settings.task == "qa":
                rows = torch.stack([out.start_logits, out.end_logits], 2).cpu().numpy()
                outputs += [row[: item.n_tokens] for row, item in zip(rows, items)]
            else:
                outputs += list(out.logits.cpu().numpy())
        return task.score(work.dev_examples, task.predictions(work.dev_examples, work.dev_items, outputs))


# ---- one contender

CHECKED = 8  # examples of the steps that must agree
CONTENDERS = ("transformers fp32", "transformers bf16", "bertfast fp32", "bertfast bf16")
FEATURES = "bertfast features"
REFERENCE = CONTENDERS[0]


def trainable(contender: str, settings: Settings, folder: Path) -> tuple[FineTuning, Callable]:
    """The task, and step(items, number) -> the step's loss, and the FLOPs its result needs (of ours alone)."""
    settings = replace(settings, precision="bf16" if contender == "bertfast bf16" else "fp32",
                       features=contender == FEATURES)
    work = FineTuning(folder, settings)
    model = work.model_for(settings.seed)
    if contender.startswith("transformers"):
        peer = Peer(work, bf16=contender.endswith("bf16"))
        peer.model.load_state_dict(model.state_dict(), strict=False)
        return work, lambda items, step: (peer.step(items, work.learning_rate(step)), 0.0)
    optimizer = work.optimizer_for(model)

    def ours(items: list[Item], step: int) -> tuple[torch.Tensor | float, float]:
        window = Window()
        work.train_step(model, optimizer, items, settings.seed, step, window)
        return window.loss, window.flops

    return work, ours


def training(contender: str, settings: dict, window: float) -> Iterator[dict]:
    """Facts: the losses of two steps with dropout off. A turn: {"seconds" (a sample), "flops" (a sample)}."""
    chosen = replace(Settings(**settings), lr=None) if contender == FEATURES else Settings(**settings)
    with tempfile.TemporaryDirectory() as folder:
        work, step = trainable(contender, replace(chosen, dropout=0.0, warmup=0.0), Path(folder))
        length, _ = Counter(work.lengths.tolist()).most_common(1)[0]
        # of one length: transformers lets padding take part in the softmax of question answering
        alike = [item for item in work.train_items if item.n_tokens == length][:CHECKED]
        losses = [float(step(alike, number)[0]) for number in (1, 2)]
        yield {} if contender == FEATURES else {"losses": losses}
        work, step = trainable(contender, chosen, Path(folder))
        batches = work.batches(chosen.seed)
        steps = cycle(range(1, work.steps + 1))
        while True:
            step(next(batches), next(steps))  # the caches are someone else's by now
            began, samples, flops = time.perf_counter(), 0, 0.0
            while time.perf_counter() - began < window:
                items = next(batches)
                flops += step(items, next(steps))[1]
                samples += len(items)
            if work.device.type == "cuda":
                torch.cuda.synchronize()
            yield {"seconds": (time.perf_counter() - began) / samples, "flops": flops / samples}


# ---- the suite


def agreement(facts: dict[str, dict]) -> dict[str, str]:
    """Whose losses, dropout off, are not the reference's: {name: reason}."""
    return pretrain.agreement(facts, REFERENCE)


def rows(key: str, settings: Settings, window: float, rounds: int, threads: int) -> tuple[list[dict], bool]:
    """One row a contender, and whether Ctrl-C cut it short."""
    entrants = [Contender(name, training, {"contender": name, "settings": asdict(settings), "window": window})
                for name in (*CONTENDERS, *((FEATURES,) if TASKS[settings.task].feature_rows else ()))]
    entrants.insert(0, Contender("machine", contest.yardstick, {}))
    outcomes, stopped = contest.contest(entrants, rounds, threads, agreement)
    peaks = contest.peaks(outcomes.pop("machine"))
    return [_row(key, name, outcome, peaks) for name, outcome in outcomes.items()], stopped


def _row(key: str, name: str, outcome: Outcome, peaks: dict[str, float]) -> dict:
    row = {"key": key, "contender": name, "failed": outcome.failed, **outcome.facts}
    if outcome.failed or not outcome.turns:
        return row
    row.update(samples=outcome.values(), **contest.middle(outcome.values()))
    flops = float(np.median(outcome.values("flops")))
    if flops and peaks:
        row.update(flops_per_sample=flops, share=flops / row["median"] / peaks[name.split()[-1]],
                   ceiling=max(peaks["fp32"], peaks["bf16"]) / flops)
    return row


def run(settings: Settings, *, window: float, rounds: int, threads: int) -> dict:
    """The result as JSON's types. Raises UserError for data or a model that cannot be fine-tuned."""
    with tempfile.TemporaryDirectory() as folder:  # read once here, so that a mistake is told before anything starts
        work = FineTuning(Path(folder), replace(settings, precision="fp32"))
    facts = {"task": settings.task, "model": Path(settings.model).name, "examples": len(work.train_examples),
             "tokens": float(work.lengths.mean()), "batch_size": settings.batch_size, "window": window,
             "rounds": rounds}
    found, stopped = rows(settings.task, settings, window, rounds, threads)
    return {"suite": "finetune", **contest.provenance(threads), "settings": facts, "stopped_early": stopped,
            "rows": found}
