"""Pretraining: phases of growing sequence length in one run, one optimiser, one schedule.

A step is `micro_batches` packed batches of `tokens` tokens each, dealt out to the processes where there are several
(bertfast.processes); its losses are normalised by the masked tokens (and sentence pairs) of the whole step. Everything
random is a function of (seed, step, position): a run that was interrupted and resumed is the run that was not.
"""

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import machine, processes, report
from .batch import PackedBatch
from .checkpoint import find, read_file, read_tensors
from .config import BertConfig
from .data.dataset import Dataset, Loader
from .data.tokenizer import Tokenizer
from .files import UserError, create_folder, locked, write_json
from .initial import start_from_counts, with_ordinary_tables
from .model import BertForMaskedLM, BertForPreTraining, BertLMHeadModel, useful_flops
from .ops.dropout import step_seed
from .optim import Optimizer
from .run_folder import FREE, Settings, check_folder, latest, read_trainer, step_of, write_checkpoint
from .step_graph import Call, StepGraph, replayable
from .version import __version__

PATIENCE = 10  # steps skipped in a row before the run stops


class Run:
    """One pretraining run in its folder: everything between `bertfast pretrain` and its closing table."""

    def __init__(self, folder: Path, settings: Settings, checkpoint: Path | None = None):
        """checkpoint: what `resume` is to go on from. Raises UserError for what no run can be made of."""
        self.folder, self.settings = folder, settings
        settings.check()
        self.device = machine.choose_device()
        trainer = self.trainer = read_trainer(checkpoint) if checkpoint else {}
        now = asdict(settings)
        changed = [f"{name} {value} (now {now[name]})" for name, value in trainer.get("settings", {}).items()
                   if name not in FREE and now[name] != value]
        if changed:
            raise UserError(f"{checkpoint} was trained with other settings: {', '.join(changed)}")
        if settings.micro_batches % processes.count():
            raise UserError(f"the {settings.micro_batches} batches of a step (--micro-batches) cannot be dealt out "
                            f"evenly to {processes.count()} processes")
        precision = trainer["precision"] if checkpoint else settings.precision
        self.precision, self.precision_reason = machine.choose_precision(precision, self.device)
        names = list(machine.DTYPES)  # where precisions are timed, the first process's clock decides
        self.precision = names[int(processes.total(names.index(self.precision) if processes.is_first() else 0)[0])]
        self.train_data = Dataset(settings.data, split="train")
        if checkpoint and trainer["data_files"] != self.train_data.manifest["files"]:
            raise UserError(f"{checkpoint} was trained on other data than {settings.data} holds now")
        self.validation_data = Dataset(settings.data, split="validation")
        self.tokenizer = self.train_data.tokenizer
        self.validation = {n: self.loader(self.validation_data, n, validation=True) for _, _, n in settings.phases()}
        self.model = self._build_model(checkpoint).to(self.device).train()
        self.config = self.model.config
        longest = max(length for _, _, length in settings.phases())
        if longest > self.config.max_position_embeddings:
            raise UserError(
                f"sequences of {longest} tokens, but the model has {self.config.max_position_embeddings} positions"
            )
        if settings.pairs and self.config.type_vocab_size < 2:
            raise UserError("next-sentence prediction needs two token types, but the model has one: add --no-nsp")
        self.model.bert.recompute = settings.recompute
        dtype = machine.DTYPES[self.precision]
        self.replayed = settings.cuda_graph and replayable(self.device, self.config) and processes.count() == 1
        self.step_graph: StepGraph | None = None  # the step of the phase in progress
        self.optimizer = Optimizer(
            self.model, dtype, kind=settings.optimizer, weight_decay=settings.weight_decay,
            betas=(0.9, 0.98), max_grad_norm=settings.max_grad_norm, sink=True,
            all_reduce=processes.add_up if processes.count() > 1 else None,
        )
        self.step = 0
        self.tokens_seen = 0
        self.loader_state: dict | None = None
        self.window_state: dict | None = None
        self.peak = machine.gemm_rate(dtype, self.device) * processes.count()
        self.stopping = 0  # see processes.stop_on_interrupt
        self.validated = True  # whether the step has had its validation, if it is to have one
        self.saved = 0  # the step of the newest checkpoint

    def _build_model(self, checkpoint: Path | None):
        settings = self.settings
        cls = BertLMHeadModel if settings.causal else BertForPreTraining if settings.nsp else BertForMaskedLM
        torch.manual_seed(settings.seed)
        if checkpoint:  # holds all of the model; what that was made from may have changed since, or be gone
            config = BertConfig.from_file(checkpoint / "config.json")
            model = cls(config)
        elif settings.init_from:
            rates = {} if settings.dropout is None else {
                "hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout}
            model = cls.from_pretrained(settings.init_from, new_heads=True, is_decoder=settings.causal, **rates)
            config = model.config
        else:
            if settings.model_config:
                config = BertConfig.from_file(Path(settings.model_config))
            else:
                config = BertConfig.preset(settings.preset)
            dropout = 0.1 if settings.dropout is None else settings.dropout
            config = replace(
                config, vocab_size=self.tokenizer.vocab_size, pad_token_id=self.tokenizer.pad_id,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                is_decoder=settings.causal,
            )
            model = cls(config)
            if settings.start == "counts":
                start_from_counts(model, self.train_data)
        self._check_vocabulary(config, checkpoint)
        return model

    def _check_vocabulary(self, config: BertConfig, checkpoint: Path | None) -> None:
        """Raises UserError where the text was prepared with another vocabulary than the model's."""
        settings = self.settings
        told = False  # whether the checkpoint to go on from has this very vocabulary
        if settings.init_from and not checkpoint:
            folder = find(settings.init_from)
            if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
                theirs = Tokenizer.load(folder)
                told = theirs.sha256 == self.tokenizer.sha256
                if told and theirs.tells_its_rules and theirs.cased != self.tokenizer.cased:
                    ours, wanted = ("cased" if cased else "uncased" for cased in (self.tokenizer.cased, theirs.cased))
                    raise UserError(f"{settings.data} was prepared {ours}, but {settings.init_from} is {wanted}: "
                                    "prepare it with the model's own rules (--vocab its folder)")
                if not told:
                    raise UserError(f"{settings.data} was prepared with another vocabulary than that of "
                                    f"{settings.init_from}: prepare it with the model's own (--vocab)")
        filled_up = config.vocab_size > self.tokenizer.vocab_size and (told or checkpoint)  # to a round size
        if config.vocab_size != self.tokenizer.vocab_size and not filled_up:
            raise UserError(
                f"{settings.data} was prepared with a vocabulary of {self.tokenizer.vocab_size}, "
                f"the model has {config.vocab_size}: prepare it with the model's own vocabulary (--vocab)"
            )

    def describe(self, allocator: str) -> dict[str, str]:
        """The header: what is about to run, and why so."""
        settings, config, data = self.settings, self.config, self.train_data
        parameters = sum(p.numel() for p in self.model.parameters())
        phases = [f"{end - start} steps of sequences up to {length}" for start, end, length in settings.phases()]
        return {
            "model": f"{type(self.model).__name__}, {settings.init_from or settings.model_config or settings.preset}: "
                     f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}",
            "parameters": f"{parameters:,}",
            "data": f"{settings.data}: {data.n_tokens:,} tokens for training, {self.validation_data.n_tokens:,} for "
                    f"validation; unigram entropy {data.manifest['unigram_entropy']:.3f} nats",
            "steps": f"{', '.join(phases)}; {settings.micro_batches * settings.tokens:,} tokens a step",
            "precision": f"{self.precision} ({self.precision_reason}), fp32 masters",
            "device": f"{self.device}, {torch.get_num_threads()} threads; GEMM peak {self.peak / 1e9:,.0f} GFLOP/s",
            "kernels": report.kernels_in_use(self.device.type),
            **({"CUDA graph": "each phase's step is captured once and replayed"} if self.replayed else {}),
            **self._describe_processes(),
            "loader": machine.loader_implementation(),
            "allocator": allocator,
            "resumed": f"from step {self.step}" if self.step else "no",
        }

    def _describe_processes(self) -> dict[str, str]:
        n = processes.count()
        if n == 1:
            return {}
        each = self.settings.micro_batches // n
        graph = "; no CUDA graph: steps of several processes are launched" if self.device.type == "cuda" else ""
        return {"processes": f"{n}, each {each} of a step's {self.settings.micro_batches} batches{graph}"}

    # ---- the loop

    def train(self) -> tuple[dict[int, dict], Path]:
        """Run to the end; the result on the validation split (256 batches of it at most) by sequence length, and the
        last checkpoint.

        Raises KeyboardInterrupt, with the exit code, after a Ctrl-C or SIGTERM, or when the output cannot be written.
        """
        settings, first = self.settings, processes.is_first()
        results: dict[int, dict] = {}
        with (locked(self.folder, self.folder) if first else nullcontext(), processes.stop_on_interrupt(self),
              report.progress(settings.steps, self.step, self.peak, settings.causal) as bar):
            if first:
                self._write_config()
            metrics = report.Metrics(self.folder, self.step, settings.tensorboard) if first else None
            for start, end, length in settings.phases():
                if self.step > end or (self.step == end and self.validated):
                    continue
                loader, window = self.loader(self.train_data, length), report.Window()
                if self.loader_state and self.step > start:
                    loader.load_state_dict(self.loader_state)
                    if self.window_state and first:
                        window.load_state_dict(self.window_state)
                batches = iter(loader)
                self.step_graph = None  # shapes are constants of a phase
                while self.step < end or not self.validated:
                    if self.validated:
                        micro = [next(batches) for _ in range(settings.micro_batches // processes.count())]
                        norm = self.train_step(micro, window)
                        self.step += 1
                        self.validated = not self._validation_is_due()
                        if self.step % settings.log_every == 0 or self.step in (end, settings.steps):
                            self._log(metrics, bar, window, norm, length)
                            window = report.Window()
                            self._check_health(results)
                    else:
                        began = time.perf_counter()
                        results |= self._validate(metrics, bar, length)
                        window.paused(time.perf_counter() - began)
                    stopping = self._is_to_stop()
                    due = self.step // settings.save_every > self.saved // settings.save_every
                    to_save = due or self.step == settings.steps or stopping
                    if to_save and self.saved < self.step and self._check_health(results):
                        self.loader_state, self.window_state = loader.state_dict(), window.state_dict()
                        began = time.perf_counter()
                        self.save()
                        window.paused(time.perf_counter() - began)
                    if stopping and not self.finished:
                        processes.wait()  # torchrun kills those that are left half a minute after the first has gone
                        raise KeyboardInterrupt(self.stopping or 130)
        if first:
            report.plot_loss(self.folder, self.train_data.manifest["unigram_entropy"], settings.causal)
        return results, self.folder / f"checkpoint-{self.saved}"

    def _write_config(self) -> None:
        """config.json, under the folder's lock. Raises UserError where another run has been there since `start`."""
        newest = latest(self.folder)
        check_folder(self.folder, resume=not newest or step_of(newest) == self.saved)
        write_json(self.folder / "config.json", {
            "settings": asdict(self.settings), "bertfast": __version__, "torch": torch.__version__,
            "precision": self.precision, "threads": torch.get_num_threads(), "data": self.train_data.manifest,
        })

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and their validation."""
        return self.step >= self.settings.steps and self.validated

    def _tell(self, show: Callable[..., None], *what: Any) -> None:
        """What cannot be shown (a pipe broke, a disk is full) is a request to stop, and stderr has the rest."""
        try:
            show(*what)
        except OSError as error:
            self.stopping, sys.stdout = self.stopping or 2, sys.stderr
            with suppress(OSError):  # it may be the same pipe
                print(f"bertfast: cannot write the output: {error.strerror}", file=sys.stderr)

    def _is_to_stop(self) -> bool:
        """Whether any of the processes was told to."""
        return processes.total(self.stopping)[0] > 0

    def _validation_is_due(self) -> bool:
        return self.step % self.settings.eval_every == 0 or self.step in [end for _, end, _ in self.settings.phases()]

    def _log(self, metrics: report.Metrics | None, bar: Any, window: report.Window, norm: torch.Tensor,
             length: int) -> None:
        """The row of a window of steps, written and shown."""
        row = window.row(self.step, self.settings.learning_rate(self.step - 1), norm, length)
        row["skipped"] = int(self.optimizer.n_skipped.item())
        if metrics:
            metrics.write(row)
        self._tell(bar.show, self.step, row, window.flops_per_second)

    def _validate(self, metrics: report.Metrics | None, bar: Any, length: int) -> dict[int, dict]:
        """This step's validation, written and shown, by sequence length, after the last step of all lengths; {} where
        a stop cut it short."""
        last = self.step == self.settings.steps
        lengths = [n for _, _, n in self.settings.phases()] if last else [length]
        found = {n: self.evaluate(n, max_batches=256 if last else 32) for n in lengths}
        self.validated = None not in found.values()
        results = {n: result for n, result in found.items() if self.validated and result}
        for n, result in results.items():
            if metrics:
                metrics.write({"step": self.step, "validation_length": n, **result})
            self._tell(bar.note, self.step, n, result)
        return results

    def train_step(self, micro: list[PackedBatch], window: report.Window) -> torch.Tensor:
        settings = self.settings
        masked, pairs, tokens = (int(n) for n in processes.total(
            sum(b.n_masked for b in micro), sum(int((b.next_sentence_label >= 0).sum()) for b in micro),
            sum(b.n_tokens for b in micro)))
        masked, pairs = max(1, masked), max(1, pairs)
        self.tokens_seen += tokens
        calls: list[Call] = [(batch, {}) for batch in micro]
        if self.step_graph is None:
            self.step_graph = StepGraph(self.model, self.optimizer, captured=calls if self.replayed else None)
        numbers = range(processes.rank(), settings.micro_batches, processes.count())  # of our batches in the step
        seeds = [step_seed(settings.seed, self.step, i) for i in numbers]
        norm = self.step_graph(calls, seeds, settings.learning_rate(self.step), (masked, pairs))
        for out, host in zip(self.step_graph.outputs, micro):
            window.add(out, host, self.step_graph.scale, masked, pairs, useful_flops(self.config, host))
        return norm

    @torch.no_grad()
    def evaluate(self, length: int, max_batches: int = 32) -> dict | None:
        """Losses and accuracies on the validation split: always the same sequences and masks, no dropout.

        None where a stop cut it short.
        """
        self.model.eval()
        totals = report.Window()
        one = torch.ones((), device=self.device)
        loader = self.validation[length]
        batches = loader.validation_batches(max_batches)
        for _ in range(-(-min(loader.batches_in_epoch(), max_batches) // processes.count())):  # as often in all of them
            if self._is_to_stop():
                return None
            if (host := next(batches, None)) is None:
                continue
            batch = host.to(self.device, non_blocking=True)
            totals.add(self.model(batch, mlm_scale=one, nsp_scale=one), host, one, 1, 1, 0.0)
        self.model.train()
        totals.gather()
        return {f"validation_{name}": value for name, value in totals.means().items()}

    def loader(self, dataset: Dataset, length: int, validation: bool = False) -> Loader:
        settings = self.settings
        return Loader(
            dataset, seed=0 if validation else settings.seed, max_seqlen=length, token_budget=settings.tokens,
            mlm_probability=settings.mlm_probability, whole_word_masking=settings.whole_word_masking,
            nsp=settings.pairs, causal=settings.causal,
            micro_batches=1 if validation else settings.micro_batches // processes.count(),
            rank=processes.rank(), world_size=processes.count(), pin_memory=self.device.type == "cuda",
        )

    def _check_health(self, results: dict[int, dict]) -> bool:
        """Raises UserError, naming the culprit, when steps are skipped in a row or the loss scale has collapsed.

        Else, whether the state is one to save: not while steps are skipped, whose weights may be what is broken and
        would take a good checkpoint's place. After the last step its validation decides.
        """
        optimizer, skipped = self.optimizer, int(self.optimizer.skipped_in_a_row)
        collapsed = optimizer.dynamic and float(optimizer.loss_scale) < 1.0
        spoilt = self.finished and not all(math.isfinite(r.get("validation_mlm_loss", 0.0)) for r in results.values())
        if skipped < (1 if spoilt else PATIENCE) and not collapsed:
            return not skipped or self.finished
        culprit = optimizer.culprit() or self._first_bad_gradient()
        why = ("the loss scale fell below 1" if collapsed else "its validation is not finite" if spoilt else
               f"{skipped} steps in a row were not finite")
        good = latest(self.folder)
        remedy = (f"Go on from the last good checkpoint in another --out: --init-from {shlex.quote(str(good))} and"
                  if good else "Try")
        raise UserError(f"stopped at step {self.step}: {why}; first not finite: {culprit}. {remedy} a lower --lr")

    def _first_bad_gradient(self) -> str:
        """What the last step, which changed no weights, comes to once more."""
        step = self.step_graph
        assert step is not None
        scales = {name: step.scale / count for name, count in step.counts.items()}
        for (batch, rest), seed in zip(step.micro, step.seeds):
            out = self.model(batch, **rest, **scales, seed=seed)
            if not torch.isfinite(out.loss):
                return "the loss"
            out.loss.backward()
            self.optimizer.accumulate()
        sums = {n: g for group in self.optimizer.groups for n, g in zip(group.names, group.gradients())}
        bad = [n for n, _ in self.model.named_parameters() if not torch.isfinite(sums[n]).all()]
        return f"the gradient of {bad[-1]}" if bad else "the norm of all gradients"

    # ---- checkpoints

    def save(self) -> None:
        """Write this step's checkpoint, from the first process alone.

        The last one of a run has tables of the ordinary size, for whoever fine-tunes it; it computes the same, where
        LayerNorm's eps is next to nothing (beside 1e-5 the tables' size counts, and they stay as they are).
        """
        self._check_agreement()
        if processes.is_first():
            masters = self.optimizer.master_state()
            weights = {n: masters[n] for n in self.model.state_dict() if n in masters}
            last, new = self.step == self.settings.steps, not self.settings.init_from
            if last and new and self.settings.start == "counts" and self.config.layer_norm_eps <= 1e-9:
                weights = with_ordinary_tables(weights)
            trainer = {
                "step": self.step, "tokens_seen": self.tokens_seen, "settings": asdict(self.settings),
                "precision": self.precision, "loader": self.loader_state, "window": self.window_state,
                "data_files": self.train_data.manifest["files"],
            }
            write_checkpoint(self.folder, trainer, self.model, weights, self.tokenizer, self.optimizer.state_dict())
        self.saved = self.step

    @torch.no_grad()
    def _check_agreement(self) -> None:
        """Raises UserError where the processes train different things: other data, settings or weights."""
        if processes.count() == 1:
            return
        about = json.dumps([asdict(self.settings), self.step, self.train_data.manifest["files"]], sort_keys=True)
        processes.check_same("settings or data", int(hashlib.sha256(about.encode()).hexdigest()[:12], 16))
        norm = sum(float(t.double().square().sum()) for t in self.optimizer.master_state().values())
        processes.check_same("weights", norm, 1e-5)  # not 0: other CPUs may round otherwise

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint that this run was made with. Raises UserError where it is damaged."""
        trainer = self.trainer
        self.optimizer.load_state_dict(read_tensors(path), read_file(path / "optimizer.safetensors"))
        self.step, self.tokens_seen, self.loader_state = trainer["step"], trainer["tokens_seen"], trainer["loader"]
        self.window_state = trainer["window"]
        self.saved = self.step
        found = {row["validation_length"] for row in report.read_metrics(self.folder)
                 if row["step"] == self.step and "validation_length" in row}
        wanted = {n for _, _, n in self.settings.phases()} if self.step == self.settings.steps else set(found)
        missing = self._validation_is_due() and not (found and found >= wanted)
        self.validated = not processes.total(missing if processes.is_first() else 0)[0]


def start(folder: Path, settings: Settings, resume: bool) -> Run:
    """A run ready to train, new or resumed.

    Raises UserError for what no run can be made of, and where another process trains it.
    """
    first = processes.is_first()
    with locked(folder, folder) if first and folder.is_dir() else nullcontext():  # one that trains deletes checkpoints
        check_folder(folder, resume)
        checkpoint = latest(folder)
        run = Run(folder, settings, checkpoint)
        if checkpoint:
            run.resume(checkpoint)
        run._check_agreement()  # and all have read what the folder held
    if first:
        create_folder(folder)
    return run
