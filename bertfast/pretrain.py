"""Pretraining: phases of growing sequence length in one run, one optimiser, one schedule.

A step is `micro_batches` packed batches of `tokens` tokens each, dealt out to the processes where there are several
(bertfast.processes); its losses are normalised by the masked tokens (and sentence pairs) of the whole step. Everything
random is a function of (seed, step, position): a run that was interrupted and resumed is the run that was not.
"""

import hashlib
import json
import math
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import machine, processes, report
from .batch import PackedBatch
from .checkpoint import find, read_tensors, refuse_others, run_settings
from .config import BertConfig
from .data.dataset import Dataset, Loader
from .data.tokenizer import Tokenizer
from .files import UserError, atomic_folder, create_folder, locked, read_json, sha256, write_json
from .initial import start_from_counts, with_ordinary_tables
from .model import BertForMaskedLM, BertForPreTraining, BertLMHeadModel
from .optim import Optimizer, check_numbers, linear_schedule
from .step_graph import Call, StepGraph
from .version import __version__

KEEP_CHECKPOINTS = 2
LARGEST_STEP = 2**27  # tokens; a step's batches are held together, in some 60 bytes a token
FREE = ("data", "recompute", "cuda_graph")  # may differ in a resumed run: they change no numbers (data: its path)
PATIENCE = 10  # steps skipped in a row before the run stops


@dataclass
class Settings:
    """What defines a run; stored in RUN/config.json, and what --resume goes on with."""

    data: str
    preset: str = "mini"
    model_config: str | None = None  # a config.json instead of a preset
    init_from: str | None = None  # a checkpoint to go on training from
    start: str = "counts"  # or "normal": see bertfast.initial
    steps: int = 1000
    tokens: int = 2048  # token budget of one packed batch
    micro_batches: int = 1  # a step, of all processes together
    lr: float = 1e-3
    warmup: float = 0.1  # share of the steps
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None  # of a new model 0.1, else the checkpoint's
    mlm_probability: float = 0.15
    whole_word_masking: bool = False
    nsp: bool = True
    causal: bool = False  # predict the next word instead (BertLMHeadModel): nothing is masked, no pairs
    short_length: int = 128  # sequence length of the first phase
    long_length: int = 512  # and of the second
    long_share: float = 0.1  # share of the steps in the second phase
    precision: str = "auto"
    recompute: bool = False
    cuda_graph: bool = True  # on a GPU, replay each phase's step as one graph
    seed: int = 1
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 500
    tensorboard: bool = False

    def phases(self) -> list[tuple[int, int, int]]:
        """(first step, end, sequence length) of each phase that has steps."""
        short = self.steps - round(self.steps * self.long_share)
        both = [(0, short, self.short_length), (short, self.steps, self.long_length)]
        return [phase for phase in both if phase[1] > phase[0]]

    @property
    def pairs(self) -> bool:
        """Whether sequences are pairs of segments, whose next-sentence loss is learned."""
        return self.nsp and not self.causal

    def check(self) -> None:
        """Raises UserError for settings no run can have."""
        for field in fields(self):
            kind: Any = field.type
            value, allowed = getattr(self, field.name), kind | int if kind in (float, float | None) else kind
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                words = {int: "a whole number", bool: "true or false", str: "text", str | None: "text"}
                raise UserError(f"{field.name} must be {words.get(kind, 'a number')}, got {value!r}")
        for name in ("steps", "micro_batches", "log_every", "eval_every", "save_every"):
            if not 1 <= getattr(self, name) <= 10**12:
                raise UserError(f"--{name.replace('_', '-')} must be between 1 and 10^12")
        if self.tokens * self.micro_batches > LARGEST_STEP:
            raise UserError(f"{self.tokens * self.micro_batches:,} tokens a step (--tokens times --micro-batches) are "
                            f"too many: {LARGEST_STEP:,} at most")
        if not 0 <= self.long_share <= 1 or not 0 <= self.warmup <= 1:
            raise UserError("--long-share and --warmup are shares, between 0 and 1")
        if self.optimizer not in ("adamw", "lamb"):
            raise UserError(f"optimizer {self.optimizer!r} is unknown; known: adamw, lamb")
        if self.start not in ("counts", "normal"):
            raise UserError(f"--start {self.start!r} is unknown; known: counts, normal")
        if self.causal and (self.whole_word_masking or self.mlm_probability != Settings.mlm_probability):
            raise UserError("--causal masks nothing: leave --whole-word-masking and --mlm-probability away")
        check_numbers(lr=self.lr, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm,
                      dropout=self.dropout, seed=self.seed)
        machine.check_precision(self.precision)
        BertConfig.preset(self.preset)
        if (self.preset != "mini") + bool(self.model_config) + bool(self.init_from) > 1:
            raise UserError("--preset, or --model-config, or --init-from: one of them says what the model is")
        for _, _, length in self.phases():
            if length < 8:
                raise UserError(f"a sequence length of {length} is out of range: 8 at least")
            if self.tokens < length:
                raise UserError(f"a budget of {self.tokens} tokens is smaller than a sequence of {length} (--tokens)")


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then linear decay to 0 (Devlin et al. 2019); `step` counts from 0."""
    return linear_schedule(settings.lr, settings.warmup, settings.steps, step)


def step_seed(seed: int, step: int, micro_batch: int = 0) -> int:
    """The dropout key of one forward: 64 well-mixed bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + micro_batch * 0x8CB92BA72F3D8DD7 + 1) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def useful_flops(config: BertConfig, batch: PackedBatch) -> float:
    """FLOPs of a training step on a packed batch that the result needs: real tokens, last layer on read rows,
    masked-only projection; the backward is twice the forward."""
    H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lengths = batch.cu_seqlens.diff().double()
    reads = batch.cu_seqlens_read.diff().double()
    tokens, read = float(lengths.sum()), float(reads.sum())
    rows = tokens * ((L - 1) * (4 * H * H + 2 * H * I) + 2 * H * H) + read * (2 * H * H + 2 * H * I)
    rows += batch.n_masked * (H * H + config.vocab_size * H)
    scores = (L - 1) * float((lengths * lengths).sum()) + float((lengths * reads).sum())
    if config.is_decoder:  # half of them are masked
        scores /= 2
    return 3 * (2 * rows + 4 * H * scores)


@contextmanager
def stop_on_interrupt(run: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sets run.stopping, to the exit code, for the end of the step in progress; the second
    interrupts at once, but in several processes, to which torchrun passes on what the terminal sent them already.

    As an exception anywhere it could strike inside C++, which aborts. Only a main thread has signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _) -> None:
        run.stopping = run.stopping or 128 + number
        if processes.count() == 1:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


class Run:
    """One pretraining run in its folder: everything between `bertfast pretrain` and its closing table."""

    def __init__(self, folder: Path, settings: Settings, checkpoint: Path | None = None):
        """checkpoint: what `resume` is to go on from. Raises UserError for what no run can be made of."""
        self.folder, self.settings = folder, settings
        settings.check()
        self.device = machine.choose_device()
        trainer = self.trainer = _trainer_state(checkpoint) if checkpoint else {}
        now = asdict(settings)
        changed = [f"{name} {value} (now {now[name]})" for name, value in trainer.get("settings", {}).items()
                   if name not in FREE and now.get(name, value) != value]
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
        self.validation = {n: self._loader(self.validation_data, n, validation=True) for _, _, n in settings.phases()}
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
        self.replayed = settings.cuda_graph and self.device.type == "cuda" and processes.count() == 1
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
        self.stopping = 0  # see stop_on_interrupt
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
        return model

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
        with (locked(self.folder, self.folder) if first else nullcontext(), stop_on_interrupt(self),
              report.progress(settings.steps, self.step, self.peak, settings.causal) as bar):
            if first:
                self._write_config()
            metrics = report.Metrics(self.folder, self.step, settings.tensorboard) if first else None
            for start, end, length in settings.phases():
                if self.step > end or (self.step == end and self.validated):
                    continue
                loader, window = self._loader(self.train_data, length), report.Window()
                if self.loader_state and self.step > start:
                    loader.load_state_dict(self.loader_state)
                    if self.window_state and first:
                        window.load_state_dict(self.window_state)
                batches = iter(loader)
                self.step_graph = None  # shapes are constants of a phase
                while self.step < end or not self.validated:
                    if self.validated:
                        micro = [next(batches) for _ in range(settings.micro_batches // processes.count())]
                        norm = self._train_step(micro, window)
                        self.step += 1
                        self.validated = not self._validation_is_due()
                        if self.step % settings.log_every == 0 or self.step in (end, settings.steps):
                            row = window.row(self.step, learning_rate(settings, self.step - 1), norm, length)
                            row["skipped"] = int(self.optimizer.n_skipped.item())
                            if metrics:
                                metrics.write(row)
                            self._tell(bar.show, self.step, row, window.flops_per_second)
                            window = report.Window()
                            self._is_healthy(results)
                    else:
                        began = time.perf_counter()
                        for n, result in self._validate(length).items():
                            results[n] = result
                            if metrics:
                                metrics.write({"step": self.step, "validation_length": n, **result})
                            self._tell(bar.note, self.step, n, result)
                        window.paused(time.perf_counter() - began)
                    stopping = self._is_to_stop()
                    due = self.step // settings.save_every > self.saved // settings.save_every
                    to_save = due or self.step == settings.steps or stopping
                    if to_save and self.saved < self.step and self._is_healthy(results):
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
        check_folder(self.folder, resume=not newest or _step_of(newest) == self.saved)
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

    def _validate(self, length: int) -> dict[int, dict]:
        """This step's validation by sequence length, after the last step at all; {} where a stop cut it short."""
        last = self.step == self.settings.steps
        lengths = [n for _, _, n in self.settings.phases()] if last else [length]
        found = {n: self.evaluate(n, max_batches=256 if last else 32) for n in lengths}
        self.validated = None not in found.values()
        return {n: result for n, result in found.items() if self.validated and result}

    def _train_step(self, micro: list[PackedBatch], window: "report.Window") -> torch.Tensor:
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
        norm = self.step_graph(calls, seeds, learning_rate(settings, self.step), (masked, pairs))
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

    def _loader(self, dataset: Dataset, length: int, validation: bool = False) -> Loader:
        settings = self.settings
        return Loader(
            dataset, seed=0 if validation else settings.seed, max_seqlen=length, token_budget=settings.tokens,
            mlm_probability=settings.mlm_probability, whole_word_masking=settings.whole_word_masking,
            nsp=settings.pairs, causal=settings.causal,
            micro_batches=1 if validation else settings.micro_batches // processes.count(),
            rank=processes.rank(), world_size=processes.count(), pin_memory=self.device.type == "cuda",
        )

    def _is_healthy(self, results: dict[int, dict]) -> bool:
        """Whether the state is one to save: not while steps are skipped, whose weights may be what is broken and would
        take a good checkpoint's place. After the last step its validation decides.

        Raises UserError, naming the culprit, when steps are skipped in a row or the loss scale has collapsed.
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
        """Write checkpoint-<step>, a Hugging Face folder and the state to go on from, atomically; keep two.

        The last one of a run has tables of the ordinary size, for whoever fine-tunes it; it computes the same, where
        LayerNorm's eps is next to nothing (beside 1e-5 the tables' size counts, and they stay as they are).
        """
        path = self.folder / f"checkpoint-{self.step}"
        self._check_agreement()
        if not processes.is_first():
            self.saved = self.step
            return
        with atomic_folder(path) as folder:
            masters = self.optimizer.master_state()
            weights = {n: masters[n] for n in self.model.state_dict() if n in masters}
            last, new = self.step == self.settings.steps, not self.settings.init_from
            if last and new and self.settings.start == "counts" and self.config.layer_norm_eps <= 1e-9:
                weights = with_ordinary_tables(weights)
            self.model.save_pretrained(folder, weights)
            self.tokenizer.save(folder)
            save_file(self.optimizer.state_dict(), folder / "optimizer.safetensors")
            trainer = {
                "step": self.step, "tokens_seen": self.tokens_seen, "settings": asdict(self.settings),
                "precision": self.precision, "loader": self.loader_state, "window": self.window_state,
                "data_files": self.train_data.manifest["files"],
                "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
            }
            write_json(folder / "trainer.json", {**trainer, "checksum": _checksum(trainer)})
        for old in _numbered(self.folder)[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)
        for leftover in self.folder.glob(".checkpoint-[0-9]*.tmp"):  # of a process killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
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
        try:
            state = load_file(path / "optimizer.safetensors")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path / 'optimizer.safetensors'} is missing or damaged: {error}") from error
        self.optimizer.load_state_dict(read_tensors(path), state)
        self.step, self.tokens_seen, self.loader_state = trainer["step"], trainer["tokens_seen"], trainer["loader"]
        self.window_state = trainer.get("window")  # checkpoints of before have none
        self.saved = self.step
        found = {row["validation_length"] for row in report.read_metrics(self.folder)
                 if row["step"] == self.step and "validation_length" in row}
        wanted = {n for _, _, n in self.settings.phases()} if self.step == self.settings.steps else set(found)
        missing = self._validation_is_due() and not (found and found >= wanted)
        self.validated = not processes.total(missing if processes.is_first() else 0)[0]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _numbered(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last; checkpoint-best and the like are the user's own."""
    return sorted((p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", p.name)), key=_step_of)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next((p for p in reversed(_numbered(folder)) if (p / "trainer.json").exists()), None)


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the run. Raises UserError where any of its files is damaged."""
    remedy = f"delete {checkpoint}, and --resume goes on from the one before"
    try:
        trainer = read_json(checkpoint / "trainer.json")
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read, and may be whole
            raise
        raise UserError(f"{error}: {remedy}") from error
    if not isinstance(trainer, dict) or {"step", "tokens_seen", "precision", "loader", "data_files"} - set(trainer):
        raise UserError(f"{checkpoint / 'trainer.json'} is damaged: {remedy}")
    checksum = trainer.pop("checksum", None)
    if checksum or "files" in trainer:  # checkpoints of before have neither
        damaged = ["trainer.json"] if checksum != _checksum(trainer) else [
            name for name, expected in trainer["files"].items() if sha256(checkpoint / name) != expected]
        if damaged:
            raise UserError(f"{checkpoint / damaged[0]} is damaged (its checksum differs): {remedy}")
    return trainer


def _checksum(trainer: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(trainer, sort_keys=True).encode()).hexdigest()


def stored_settings(folder: Path) -> Settings:
    """What a run's config.json says. Raises UserError where it is not one of ours."""
    values = run_settings(folder) or {}
    known = {f.name for f in fields(Settings)}
    if "data" not in values or set(values) - known:
        raise UserError(f"{folder / 'config.json'} is not that of a pretraining run")
    settings = Settings(**values)
    try:
        settings.check()
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from error
    return settings


def check_folder(folder: Path, resume: bool) -> None:
    """Raises UserError where the folder holds what a run there would spoil, or a run it does not resume."""
    refuse_others(folder, "data", ("metrics.jsonl", "loss.png"))
    if (checkpoint := latest(folder)) and not resume:
        raise UserError(f"{folder} already holds a run ({checkpoint.name}): add --resume, or choose another --out")


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


