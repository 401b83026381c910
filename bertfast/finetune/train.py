"""The fine-tuning loop: a pretrained encoder and a new head on packed batches, the best checkpoint kept.

A step takes `batch_size` examples, packed into as few token budgets as they need; its loss is normalised over the whole
step. Order, dropout and head are functions of the seed. After every evaluation that is the best so far, the checkpoint
and its predictions are on disk: a Ctrl-C loses nothing but the steps since.
"""

import copy
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertfast import machine, report
from bertfast.batch import PackedBatch
from bertfast.checkpoint import Checkpointed, find, refuse_others
from bertfast.config import BertConfig
from bertfast.data.tokenizer import Tokenizer
from bertfast.files import UserError, atomic_folder, create_folder, locked, without_links, write_bytes, write_json
from bertfast.finetune import show
from bertfast.finetune.batches import Item, by_budget, epoch_batches
from bertfast.finetune.classify import Classification
from bertfast.finetune.predict import json_line, run, with_features
from bertfast.finetune.read import Table
from bertfast.finetune.task import LEARNING_RATES, Example, Settings, Task
from bertfast.finetune.tasks import TASKS, check
from bertfast.ops.dropout import step_seed
from bertfast.optim import Optimizer, linear_schedule
from bertfast.processes import stop_on_interrupt
from bertfast.seq2seq import BertForSeq2Seq, read_config
from bertfast.step_graph import Call, StepGraph, replayable, signature
from bertfast.version import __version__

SCALES = ("scale",)  # what a head calls the factor of its loss
OF_THE_BEST = ("predictions.jsonl", "metrics.json", "loss.png", "confusion.png")  # written beside its checkpoint
GRAPHS = 64  # CUDA graphs at most; steps of yet other shapes are launched
HELD_OUT = 10  # without a dev file, one example in so many is kept for evaluation


class FineTuning:
    """Data, task and model of one `bertfast finetune`: everything between the command and its closing table."""

    def __init__(self, folder: Path, settings: Settings):
        check(settings)
        self.folder, self.settings = folder, settings
        self.device = machine.choose_device()
        self.precision, self.precision_reason = machine.choose_precision(settings.precision, self.device)
        checkpoint = find(settings.model)
        self.tokenizer = Tokenizer.load(checkpoint)
        self.config = config = read_config(checkpoint / "config.json")[0]
        if config.vocab_size < self.tokenizer.vocab_size:
            raise UserError(f"{settings.model}: a vocabulary of {self.tokenizer.vocab_size}, but the model has "
                            f"{config.vocab_size} words")
        self.task = TASKS[settings.task](settings, self.tokenizer, config.max_position_embeddings)
        self.train_examples, self.dev_examples = self._read()
        self.task.learn(self.train_examples, self.dev_examples)
        if settings.metric and settings.metric not in self.task.metrics:  # which the tags decide, too
            raise UserError(f"--metric {settings.metric}: this task has {', '.join(self.task.metrics)}")
        self.dev_examples = self.task.gathered(self.dev_examples)
        self.metric = settings.metric or self.task.metrics[0]
        self.train_items = self.task.items(self.train_examples)
        self.dev_items = self.task.items(self.dev_examples)
        # the words' own vectors know no segments
        parts = (s for item in self.train_items + self.dev_items for s in item.sequences)
        if config.type_vocab_size < 2 and not settings.static and any(s.second < len(s.ids) for s in parts):
            raise UserError(f"{settings.model} has one token type (type_vocab_size 1), but this task reads "
                            "pairs: a question and its context, two texts, or a source and its target")
        self.lengths = np.array([item.n_tokens for item in self.train_items])
        per_epoch = -(-len(self.train_items) // settings.batch_size)
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * per_epoch))
        self.eval_every = settings.eval_every or per_epoch
        self.peak = machine.gemm_rate(machine.DTYPES[self.precision], self.device)
        self.stopping = 0  # see stop_on_interrupt
        self.replayed = settings.cuda_graph and replayable(self.device, self.config) and not settings.features
        self.loaded: Checkpointed | None = None  # the first seed's model, until it is trained
        self.launched: StepGraph | None = None  # the step of the model in training, and of each of its shapes
        self.graphs: dict[tuple, StepGraph | None] = {}  # None: these shapes came once
        self.best: dict | None = None  # {"seed", "step", metric …} of the checkpoint on disk
        self.rows: list[dict] = []  # of metrics.jsonl

    def _read(self) -> tuple[list[Example], list[Example]]:
        settings = self.settings
        examples = [read(self.task, self.task.open(path)) for path in (settings.train, settings.dev) if path]
        if settings.dev is None:
            examples = list(held_out(self.task, examples[0]))
            self.task.counts[f"examples held out for evaluation, one text in {HELD_OUT} (no --dev)"] = len(examples[1])
            if not examples[1]:
                raise UserError(f"{settings.train} has too few examples to hold some out: name a --dev file")
        return examples[0], examples[1]

    # ---- the model

    def model_for(self, seed: int) -> Checkpointed:
        """The pretrained encoder with a new head, its initial values a function of the seed.

        A checkpoint that was fine-tuned for this task, with the same labels, goes on with its head.
        """
        settings, task = self.settings, self.task
        torch.manual_seed(seed)
        changes: dict = {}
        if settings.dropout is not None:
            changes = {"hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout}
        config, _ = read_config(find(settings.model) / "config.json")
        if changes and config.extra.get("classifier_dropout") is not None:
            config.extra["classifier_dropout"] = settings.dropout
        task.configure(config)
        model = task.head.from_pretrained(settings.model, new_heads=True, extra=config.extra, **changes)
        freeze(model, settings.freeze)
        model = model.to(self.device).train()
        if settings.features and self.train_items[0].features is None:
            encoder = copy.deepcopy(model).to(machine.DTYPES[self.precision])  # as whoever predicts computes them
            self.train_items, self.dev_items = (
                with_features(encoder, task, items, settings.tokens, self.go_on)
                for items in (self.train_items, self.dev_items)
            )
        return model

    def optimizer_for(self, model: Checkpointed) -> Optimizer:
        settings = self.settings
        return Optimizer(
            model, machine.DTYPES[self.precision], eps=1e-8, weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm, lr_scale=layer_scale(model.config, settings.layer_decay),
            sink=True,
        )

    def describe(self, allocator: str) -> dict[str, str]:
        """The header: what is about to run, and why so."""
        settings, n_tokens = self.settings, int(self.lengths.sum())
        per_step = n_tokens / len(self.lengths) * min(settings.batch_size, len(self.lengths))
        cached = {}
        if settings.features:
            rows = sum(map(self.task.n_features, self.train_items + self.dev_items))
            layers = 1 if settings.static else self.config.num_hidden_layers + 1
            what = "word vectors" if settings.static else "all layers' outputs"
            size = 2 * rows * layers * self.config.hidden_size
            cached = {"features": f"{rows:,} rows of {what}, {size / 1e9:,.1f} GB in memory"}
        return {
            "task": f"{settings.task}: {self.task.head.__name__}"
                    + (f", {len(self.task.labels)} labels" if settings.task in ("classification", "tagging") else ""),
            "model": settings.model,
            "data": f"{len(self.train_examples):,} examples for training ({len(self.train_items):,} sequences or "
                    f"windows, {n_tokens:,} tokens), {len(self.dev_examples):,} for evaluation",
            "steps": f"{self.steps:,} of {settings.batch_size} (about {per_step:,.0f} tokens), "
                     f"evaluation every {self.eval_every:,}; seeds: {settings.seeds}",
            **cached,
            "judged by": self.metric,
            "precision": f"{self.precision} ({self.precision_reason}), fp32 masters"
                         + (", steps that recur replayed as CUDA graphs" if self.replayed else ""),
            "device": f"{self.device}, {torch.get_num_threads()} threads; GEMM peak {self.peak / 1e9:,.0f} GFLOP/s",
            "kernels": report.kernels_in_use(self.device.type),
            "allocator": allocator,
        }

    # ---- the loop

    def train(self) -> dict:
        """All seeds; the content of metrics.json. A Ctrl-C passes through when the best so far is written down.

        A run that the folder holds is replaced once there is a model to train.
        """
        results: list[dict] = []
        with stop_on_interrupt(self):
            self.loaded = self.model_for(self.settings.seed)
            self._replace()
            try:
                for seed in range(self.settings.seed, self.settings.seed + self.settings.seeds):
                    results.append(self._train_seed(seed))
            finally:
                summary = self._summary(results)
        return summary

    def _replace(self) -> None:
        folder = self.folder
        for name in OF_THE_BEST:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        write_json(folder / "config.json", {
            "settings": asdict(self.settings), "bertfast": __version__, "torch": torch.__version__,
            "precision": self.precision, "threads": torch.get_num_threads(),
        })
        write_bytes(folder / "metrics.jsonl", b"")

    def go_on(self) -> None:
        """Raises KeyboardInterrupt, with the exit code, after a Ctrl-C or SIGTERM."""
        if self.stopping:
            raise KeyboardInterrupt(self.stopping)

    def _train_seed(self, seed: int) -> dict:
        settings = self.settings
        self.launched, self.graphs = None, {}  # before the next model: they hold the last one
        model, self.loaded = self.loaded or self.model_for(seed), None
        optimizer = self.optimizer_for(model)
        best: dict = {}
        batches, stale = self.batches(seed), 0
        window = Window()
        with report.progress(self.steps, 0, self.peak) as bar:
            for step in range(1, self.steps + 1):
                self.go_on()
                norm = self.train_step(model, optimizer, next(batches), seed, step, window)
                loss = window.loss
                logged, judged = (step % n == 0 or step == self.steps for n in (settings.log_every, self.eval_every))
                if logged:
                    row = window.row(seed, step, self.learning_rate(step), norm)
                    self._log(row)
                    bar.show(step, row, window.flops / row.pop("seconds"))
                    window = Window()
                patience = 1 if judged else settings.log_every  # nothing that is broken is judged, and saved
                if (logged or judged) and not math.isfinite(loss) and int(optimizer.skipped_in_a_row) >= patience:
                    raise UserError(f"stopped at step {step}: the loss is not a number; first not finite: "
                                    f"{optimizer.culprit() or 'the loss'}; try a lower --lr")
                if not judged:
                    continue
                began = time.perf_counter()
                scores, predictions = self.evaluate(model)
                self._log({"seed": seed, "step": step, **{f"dev_{n}": v for n, v in scores.items()}})
                show.evaluation(step, scores)
                stale = 0 if not best or scores[self.metric] > best[self.metric] else stale + 1
                if stale == 0:
                    best = {"seed": seed, "step": step, **scores}
                    if self.best is None or best[self.metric] > self.best[self.metric]:
                        self.save(model, optimizer, predictions, best)
                        self.best = best
                window.began += time.perf_counter() - began
                if settings.patience and stale >= settings.patience:
                    show.note(f"stopped at step {step}: {stale} evaluations without a better {self.metric}")
                    break
        return best

    def learning_rate(self, step: int) -> float:
        """Of a step, counted from 1."""
        peak = LEARNING_RATES[self.settings.features] if self.settings.lr is None else self.settings.lr
        return linear_schedule(peak, self.settings.warmup, self.steps, step - 1)

    def batches(self, seed: int) -> Iterator[list[Item]]:
        epoch = 0
        while True:
            for indices in epoch_batches(self.lengths, self.settings.batch_size, seed, epoch):
                yield [self.train_items[i] for i in indices]
            epoch += 1

    def train_step(self, model, optimizer: Optimizer, items: list[Item], seed: int, step: int, window: "Window"):
        settings = self.settings
        groups = [items] if settings.features else by_budget(items, settings.tokens, balanced=True)
        calls, first = [], 0
        for group in groups:
            calls.append(self.task.call(group, first, self.replayed))
            first += sum(len(item.sequences) for item in group)
        graph = self._step_graph(model, optimizer, calls)
        n_targets = max(1, self.task.n_targets(items))
        norm = graph(calls, [step_seed(seed, step)] * len(calls), self.learning_rate(step), [n_targets])
        losses: list[Any] = [out.loss for out in graph.outputs]
        window.loss = window.loss + sum(losses) / graph.scale
        window.tokens += sum(item.n_tokens for item in items)
        window.flops += sum(self.task.flops(model.config, b) for b, _ in calls if isinstance(b, PackedBatch))
        window.steps += 1
        return norm

    def _step_graph(self, model, optimizer: Optimizer, calls: list[Call]) -> StepGraph:
        """The step for these batches: launched where their shapes are new, from then on one CUDA graph."""
        if self.launched is None:
            self.launched = StepGraph(model, optimizer, SCALES)
        if not self.replayed:
            return self.launched
        key, captured = signature(calls), [graph for graph in self.graphs.values() if graph]
        if key in self.graphs and not self.graphs[key] and len(captured) < GRAPHS:
            self.graphs[key] = StepGraph(model, optimizer, SCALES, calls, captured[0] if captured else None)
        return self.graphs.setdefault(key, None) or self.launched

    def evaluate(self, model) -> tuple[dict[str, float], list[dict]]:
        """(metrics, predictions) of the dev examples."""
        outputs = run(model, self.task, self.dev_items, self.settings.tokens, self.go_on)
        predictions = self.task.predictions(self.dev_examples, self.dev_items, outputs)
        return self.task.score(self.dev_examples, predictions), predictions

    # ---- what is written

    def save(self, model, optimizer: Optimizer, predictions: list[dict], best: dict) -> None:
        """checkpoint/, a folder for transformers and for `bertfast predict`, and predictions.jsonl."""
        masters = optimizer.master_state()
        state = {name: masters.get(name, tensor).float() for name, tensor in model.state_dict().items()}
        with atomic_folder(self.folder / "checkpoint") as folder:
            model.save_pretrained(folder, state)
            self.tokenizer.save(folder)
            write_json(folder / "finetune.json", {
                "bertfast": __version__, "settings": asdict(self.settings), "labels": self.task.labels,
                "roles": self.task.read_roles, "columns": self.task.read_columns,
                "format": self.task.read_format, "best": best,
            })
        lines = (json_line({"example": e.where, "gold": self.task.gold(e), **p})
                 for e, p in zip(self.dev_examples, predictions))
        write_bytes(self.folder / "predictions.jsonl", "".join(lines).encode())
        if "label" in predictions[0] and isinstance(self.task, Classification):
            show.plot_confusion(self.folder / "confusion.png", *self.task.decisions(self.dev_examples, predictions),
                                self.task.labels)

    def _log(self, row: dict) -> None:
        self.rows.append(row)
        report.append_row(self.folder / "metrics.jsonl", row)

    def _summary(self, results: list[dict]) -> dict:
        names = [name for name in self.task.metrics if results and name in results[0]]
        values = {name: [r[name] for r in results] for name in names}
        summary = {
            "task": self.settings.task, "metric": self.metric, "best": self.best, "seeds": results,
            "mean": {name: float(np.mean(v)) for name, v in values.items()},
            "std": {name: float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()},
            "decisions": dict(self.task.counts),
        }
        write_json(self.folder / "metrics.json", summary)
        show.plot_loss(self.folder / "loss.png", self.rows, self.metric)
        return summary


class Window:
    """Sums over the steps between two rows of metrics."""

    def __init__(self):
        self.began, self.steps, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0
        self.loss: torch.Tensor | float = 0.0

    def row(self, seed: int, step: int, lr: float, norm: torch.Tensor) -> dict:
        seconds = time.perf_counter() - self.began
        return {"seed": seed, "step": step, "loss": float(self.loss) / self.steps, "lr": lr, "grad_norm": float(norm),
                "tokens_per_sec": self.tokens / seconds, "seconds": seconds}


def read(task: Task, table: Table) -> list[Example]:
    """All examples of a table, checked."""
    columns = task.as_in_training(table, task.find_columns(table))
    examples = [task.example(row, columns) for row in table]
    if not examples:
        raise UserError(f"{table.path} holds no examples")
    show.understood(table, columns, len(examples))
    return examples


def held_out(task: Task, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """(train, dev): of all texts each tenth is kept apart, with all examples that share it."""
    groups = list(dict.fromkeys(map(task.group, examples)))
    chosen = set(groups[HELD_OUT - 1 :: HELD_OUT])
    return tuple([e for e in examples if (task.group(e) in chosen) == wanted] for wanted in (False, True))  # type: ignore


def freeze(model, what: str) -> None:
    """Let part of the encoder be: "none", "embeddings", a number of layers from below (embeddings too), or "all".

    Pooler and head always learn. Raises UserError for anything else.
    """
    layers = model.config.num_hidden_layers
    if what not in ("none", "embeddings", "all") and not (what.isdecimal() and int(what) <= layers):
        raise UserError(f"--freeze {what}: say none, embeddings, a number of layers up to {layers}, or all")
    n = {"none": -1, "embeddings": 0, "all": layers}.get(what)
    n = int(what) if n is None else n
    if n >= 0:
        encoder: Any = model.encoder if isinstance(model, BertForSeq2Seq) else model.bert
        for part in (encoder.embeddings, *encoder.encoder["layer"][:n]):
            part.requires_grad_(False)


def layer_scale(config: BertConfig, decay: float):
    """Parameter name -> factor of its learning rate: 1 at the head, `decay` times less a layer downwards.

    Discriminative fine-tuning (Howard and Ruder 2018).
    """
    def scale(name: str) -> float:
        if not re.match(r"(bert|encoder|decoder\.bert)\.(embeddings|encoder)\.", name):
            return 1.0
        layer = int(name.split(".layer.")[1].partition(".")[0]) if ".layer." in name else -1
        return decay ** (config.num_hidden_layers - layer)

    return scale


def refuse_a_run(folder: Path, overwrite: bool) -> None:
    """Raises UserError where `folder` holds a run that is not to be replaced, or what is no fine-tuning's."""
    refuse_others(folder, "task", ("metrics.jsonl", "checkpoint", *OF_THE_BEST))
    checkpoint = folder / "checkpoint"
    if checkpoint.exists() and not (checkpoint / "finetune.json").exists():
        raise UserError(f"{checkpoint} was not written by a fine-tuning: choose another --out")
    if checkpoint.exists() and not overwrite:
        raise UserError(f"{folder} already holds a fine-tuning: choose another --out, or add --overwrite")


def finetune(folder: Path, settings: Settings, allocator: str, overwrite: bool = False) -> dict:
    """`bertfast finetune`: from settings to the closing table. Returns the content of metrics.json.

    Raises UserError for a fault in settings or data, and where `folder` holds a run that is not to be replaced, or is
    another process's.
    """
    if find(settings.model).resolve().is_relative_to(without_links(folder)):
        raise UserError(f"{settings.model} lies in {folder}, which is to be written: choose another --out")
    refuse_a_run(folder, overwrite)
    began = time.perf_counter()
    work = FineTuning(folder, settings)
    show.decisions(work.task)
    show.examples(work.task, work.train_examples[:3], work.train_items)
    report.header(work.describe(allocator))
    with locked(create_folder(folder), folder):
        refuse_a_run(folder, overwrite)  # one that ended while our data was read
        try:
            summary = work.train()
        except KeyboardInterrupt:
            show.note(f"stopped; the best so far: {folder / 'checkpoint'} ({work.metric} {work.best[work.metric]:.4f})"
                      if work.best else "stopped before the first evaluation: nothing was saved")
            raise
    show.closing_table(summary)
    show.note(f"done in {time.perf_counter() - began:.0f} s; best checkpoint: {folder / 'checkpoint'}; "
              f"metrics: {folder / 'metrics.json'}; predictions: {folder / 'predictions.jsonl'}")
    return summary
