"""A pretraining run on disk: the settings in its config.json, its checkpoints, and what a new run may not spoil."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from . import machine
from .checkpoint import Checkpointed, refuse_others, run_settings
from .config import BertConfig
from .data.tokenizer import Tokenizer
from .files import UserError, atomic_folder, read_json, sha256, write_json
from .optim import check_numbers, linear_schedule

KEEP_CHECKPOINTS = 2
LARGEST_STEP = 2**27  # tokens; a step's batches are held together, in some 60 bytes a token
FREE = ("data", "recompute", "cuda_graph")  # may differ in a resumed run: they change no numbers (data: its path)


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

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to 0 (Devlin et al. 2019); `step` counts from 0."""
        return linear_schedule(self.lr, self.warmup, self.steps, step)

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
            raise UserError("--causal masks nothing: remove --whole-word-masking and --mlm-probability")
        check_numbers(lr=self.lr, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm,
                      dropout=self.dropout, seed=self.seed)
        machine.check_precision(self.precision)
        BertConfig.preset(self.preset)
        if (self.preset != "mini") + bool(self.model_config) + bool(self.init_from) > 1:
            raise UserError("give one of --preset, --model-config and --init-from")
        for _, _, length in self.phases():
            if length < 8:
                raise UserError(f"a sequence length of {length} is out of range: 8 at least")
            if self.tokens < length:
                raise UserError(f"a budget of {self.tokens} tokens is smaller than a sequence of {length} (--tokens)")


def write_checkpoint(folder: Path, trainer: dict[str, Any], model: Checkpointed, weights: dict[str, Tensor],
                     tokenizer: Tokenizer, optimizer: dict[str, Tensor]) -> None:
    """checkpoint-<step>, a Hugging Face folder and the state to go on from, atomically; the newest two are kept.

    trainer: what the loop goes on from, `step` and `settings` among it. Raises UserError where it cannot be written.
    """
    with atomic_folder(folder / f"checkpoint-{trainer['step']}") as new:
        model.save_pretrained(new, weights)
        tokenizer.save(new)
        save_file(optimizer, new / "optimizer.safetensors")
        trainer = {**trainer, "files": {path.name: sha256(path) for path in sorted(new.iterdir())}}
        write_json(new / "trainer.json", {**trainer, "checksum": _checksum(trainer)})
    for old in _numbered(folder)[:-KEEP_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".checkpoint-[0-9]*.tmp"):  # of a process killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _numbered(folder: Path) -> list[Path]:
    """A run's checkpoints, the newest last; checkpoint-best and the like are the user's own."""
    return sorted((p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", p.name)), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next((p for p in reversed(_numbered(folder)) if (p / "trainer.json").exists()), None)


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the run. Raises UserError where any of its files is damaged."""
    remedy = f"delete {checkpoint}, and --resume goes on from the one before"
    try:
        trainer = read_json(checkpoint / "trainer.json")
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be read, and may be whole
            raise
        raise UserError(f"{error}: {remedy}") from error
    if not isinstance(trainer, dict) or trainer.pop("checksum", None) != _checksum(trainer):
        raise UserError(f"{checkpoint / 'trainer.json'} is damaged (its checksum differs): {remedy}")
    if damaged := [name for name, expected in trainer["files"].items() if sha256(checkpoint / name) != expected]:
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
