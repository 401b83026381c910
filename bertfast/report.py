"""What a run shows and writes down: header, progress, metrics.jsonl, loss.png, the closing table."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text  # printed as it is: [MASK] would be markup

from . import processes
from .batch import PackedBatch
from .files import UserError, atomic_path, write_bytes
from .model import ModelOutput


class HonestConsole(Console):
    def on_broken_pipe(self) -> None:
        """Called for an exception, which rich would make an end without a word."""
        raise


console = HonestConsole()


class Window:
    """Sums over the steps between two rows of metrics; stays on the device until it is read."""

    def __init__(self):
        self.began = time.perf_counter()
        self.tokens = self.flops = 0.0
        self.sums: dict[str, torch.Tensor | float] = {}

    def add(self, out: ModelOutput, host: PackedBatch, loss_scale, masked: int, pairs: int, flops: float) -> None:
        """A micro-batch; its losses are sums times loss_scale / masked and loss_scale / pairs."""
        self.tokens += host.n_tokens
        self.flops += flops
        found = {"n_masked": out.n_masked, "n_correct": out.n_correct, "n_pairs": out.n_pairs,
                 "n_pairs_correct": out.n_pairs_correct}
        for name, loss, count in (("mlm", out.mlm_loss, masked), ("nsp", out.nsp_loss, pairs)):
            found[name] = None if loss is None else loss.detach() * (count / loss_scale)
        for name, value in found.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0.0) + value

    def gather(self) -> None:
        """Move the sums of all processes into the first one's."""
        if processes.count() == 1:
            return
        names = ("mlm", "nsp", "n_masked", "n_correct", "n_pairs", "n_pairs_correct")
        sums = processes.total(self.tokens, self.flops, *(float(self.sums.get(name, 0.0)) for name in names))
        self.tokens, self.flops, *of_names = sums if processes.is_first() else [0.0] * len(sums)
        self.sums = {name: value for name, value in zip(names, of_names) if name in self.sums}

    def paused(self, seconds: float) -> None:
        """Time that was not training (evaluation, checkpoints)."""
        self.began += seconds

    def state_dict(self) -> dict:
        """In JSON's types, for a checkpoint between two rows: the row after it is that of an unbroken run."""
        self.gather()
        sums = {name: total.item() if isinstance(total, torch.Tensor) else total for name, total in self.sums.items()}
        return {"seconds": time.perf_counter() - self.began, "tokens": self.tokens, "flops": self.flops, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        self.began = time.perf_counter() - state["seconds"]
        self.tokens, self.flops, self.sums = state["tokens"], state["flops"], dict(state["sums"])

    def means(self) -> dict[str, float]:
        """mlm_loss and nsp_loss per label in nats, and the two accuracies; those that were computed."""
        value = {name: float(total) for name, total in self.sums.items()}
        means = {}
        for loss, correct, count in (("mlm", "n_correct", "n_masked"), ("nsp", "n_pairs_correct", "n_pairs")):
            if count in value:
                means[f"{loss}_loss"] = value[loss] / max(1.0, value[count])
                means[f"{loss}_accuracy"] = value[correct] / max(1.0, value[count])
        return means

    def row(self, step: int, lr: float, norm: torch.Tensor, length: int) -> dict:
        self.gather()
        means = self.means()
        seconds = time.perf_counter() - self.began
        self.flops_per_second = self.flops / seconds
        loss = means.get("mlm_loss", 0.0) + means.get("nsp_loss", 0.0)
        return {"step": step, "loss": loss, **means, "lr": lr, "grad_norm": float(norm), "max_seqlen": length,
                "tokens_per_sec": self.tokens / seconds}


class Metrics:
    """RUN/metrics.jsonl, a row a logged step, each on disk when written; and TensorBoard's events on request.

    A resumed run drops the rows after its checkpoint's step first.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.events = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs the package tensorboard (pip install 'bertfast[log]')") from error
            self.events = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, row: dict) -> None:
        append_row(self.path, row)
        if self.events:
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self.events.add_scalar(name, value, row["step"])


def append_row(path: Path, row: dict) -> None:
    """A line of a metrics.jsonl, on disk when written; a number that is none is null, for JSON has no NaN.

    Raises UserError where it cannot be written.
    """
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a line cut short by a crash, or damaged, is left out.

    Raises UserError for a row of other things than numbers, which no crash makes.
    """
    rows, path = [], folder / "metrics.jsonl"
    if path.exists():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    if not all(value is None or isinstance(value, (int, float)) for value in row.values()):
                        raise UserError(f"{path} is damaged: line {number} holds more than numbers: delete it")
                    rows.append(row)
    return rows


class _Bar:
    """The live line on a terminal, or a plain line now and then where the output is a file.

    Its methods raise OSError where that cannot be written.
    """

    def __init__(self, bar: Progress | None, task, peak: float, steps: int, causal: bool):
        self.bar, self.task, self.peak, self.steps, self.causal = bar, task, peak, steps, causal
        self.last_line = 0.0

    def show(self, step: int, row: dict, flops_per_second: float) -> None:
        share = f"  {100 * flops_per_second / self.peak:.0f} % of peak" if flops_per_second else ""
        text = f"loss {row['loss']:.3f}  {row['tokens_per_sec']:,.0f} tokens/s{share}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif time.perf_counter() - self.last_line > 10 or step == self.steps:
            self.last_line = time.perf_counter()
            print(f"step {step}/{self.steps}  {text}", flush=True)

    def note(self, step: int, length: int, result: dict) -> None:
        parts = [f"step {step:>6}  validation at {length}:"]
        if "validation_mlm_loss" in result:
            name = "next word" if self.causal else "MLM"
            parts.append(f"{name} {result['validation_mlm_loss']:.3f} nats ({result['validation_mlm_accuracy']:.1%})")
        if "validation_nsp_loss" in result:
            parts.append(f"NSP {result['validation_nsp_loss']:.3f} ({result['validation_nsp_accuracy']:.1%})")
        print("  ".join(parts), flush=True)


def _lives() -> bool:
    """Whether what is shown can be written over."""
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def progress(steps: int, done: int, peak: float, causal: bool = False):
    """A progress bar over `steps`, of which `done` are behind; peak in FLOP/s."""
    if not _lives():
        yield _Bar(None, None, peak, steps, causal)
        return
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"),
               TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(compact=True))
    # two rows are needed for an ETA, and may be far more apart than the 30 s that rich remembers
    with Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        yield _Bar(bar, bar.add_task("", total=steps, completed=done, text=""), peak, steps, causal)


@contextmanager
def counter(what: str):
    """A live count of something whose end is not known; yields a function that takes the count so far."""
    if not _lives():
        yield lambda n: None
        return
    with Progress(TextColumn(what), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda n: bar.update(task, completed=n)


def header(rows: dict[str, str]) -> None:
    """A two-column table of what is about to run."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", Text(value))
    console.print(table)


def note(text: str) -> None:
    """A line as it is: a path in it may hold what looks like markup, and is not to be folded."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def kernels_in_use(device: str) -> str:
    """One line: which implementation runs how many of the ops."""
    from .ops import backends

    counts: dict[str, int] = {}
    for devices in backends().values():
        counts[devices[device]] = counts.get(devices[device], 0) + 1
    return "; ".join(f"{name} ({n} ops)" for name, n in sorted(counts.items(), key=lambda item: -item[1]))


def pyplot():
    """matplotlib's, imported when first needed, and then without a display: MPLBACKEND may name a notebook's."""
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path: Path) -> None:
    """A figure as PNG; it is let go of. Raises UserError where it cannot be written."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot().close(figure)


def plot_loss(folder: Path, entropy: float, causal: bool) -> None:
    """RUN/loss.png from metrics.jsonl: the words' loss, training and validation, above next-sentence accuracy."""
    rows = read_metrics(folder)
    train = [r for r in rows if r.get("mlm_loss") is not None]
    then = lambda step: next((r["max_seqlen"] for r in train if r["step"] >= step), None)  # a phase ends with a row
    own = [r for r in rows if "validation_length" in r and r["validation_length"] == then(r["step"])]
    validation = [r for r in own if r.get("validation_mlm_loss") is not None]
    nsp = [r for r in own if r.get("validation_nsp_accuracy") is not None]
    if not train:
        return
    figure, axes = pyplot().subplots(2 if nsp else 1, 1, figsize=(8, 6 if nsp else 4), sharex=True, squeeze=False,
                                     height_ratios=[2, 1] if nsp else [1], layout="constrained")
    top = axes[0][0]
    x = [r["step"] for r in train]
    marker = "o" if len(x) == 1 else ""  # a point is no line
    top.plot(x, [r["mlm_loss"] for r in train], marker, color="#56B4E9", alpha=0.5, linewidth=0.8, label="training")
    top.plot(x, _smooth([r["mlm_loss"] for r in train]), color="#0072B2", label="training, smoothed")
    top.plot([r["step"] for r in validation], [r["validation_mlm_loss"] for r in validation], color="#D55E00",
             marker="o", markersize=4, label="validation")
    top.axhline(entropy, color="black", linestyle="--", linewidth=0.8, label="unigram entropy of the text")
    top.set_ylabel(f"{_predicted(causal)} loss (nats)")
    lengths = [r["max_seqlen"] for r in train]
    for i in range(1, len(lengths)):
        if lengths[i] != lengths[i - 1]:
            for row in axes:
                row[0].axvline(x[i - 1], color="grey", linewidth=0.8)
            top.annotate(f"sequences of {lengths[i]}", (x[i - 1], top.get_ylim()[1]), (-4, -4),
                         textcoords="offset points", va="top", ha="right", fontsize=8)
    top.legend(loc="best", fontsize=9)
    if nsp:
        bottom = axes[1][0]
        bottom.plot([r["step"] for r in nsp], [r["validation_nsp_accuracy"] for r in nsp], color="#D55E00", marker="o",
                    markersize=4)
        bottom.axhline(0.5, color="black", linestyle="--", linewidth=0.8)
        bottom.set_ylabel("next-sentence accuracy\n(validation)")
        bottom.set_ylim(0.4, 1.0)
    axes[-1][0].set_xlabel("step")
    save_figure(figure, folder / "loss.png")


def _predicted(causal: bool) -> str:
    return "next-word" if causal else "masked-LM"


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smooth, total, weight = [], 0.0, 0.8
    for i, value in enumerate(values, 1):
        total = weight * total + (1 - weight) * value
        smooth.append(total / (1 - weight**i))
    return smooth


def closing_table(folder: Path, results: dict[int, dict], entropy: float, causal: bool) -> None:
    """The run's last figures, training beside validation on sequences of each length."""
    rows = [r for r in read_metrics(folder) if r.get("mlm_loss") is not None][-10:]
    columns = [{name: sum(r[name] for r in rows) / len(rows) for name in rows[-1] if name in _CLOSING} if rows else {}]
    columns += [{name.removeprefix("validation_"): value for name, value in r.items()} for r in results.values()]
    table = Table(title="result", title_justify="left")
    for title in ("", "training (last 10 rows)", *(f"validation at {length}" for length in results)):
        table.add_column(title, justify="left" if not title else "right")
    for name, (title, form) in _CLOSING.items():
        if any(name in column for column in columns):
            cells = [format(c[name], form) if name in c else "" for c in columns]
            table.add_row(title.format(_predicted(causal)), *cells)
        if name == "mlm_loss":
            below = (format(entropy - c[name], ".3f") if name in c else "" for c in columns)
            table.add_row("  below the unigram entropy", *below)
    console.print(table)


_CLOSING = {
    "mlm_loss": ("{} loss, nats", ".3f"),
    "mlm_accuracy": ("{} accuracy", ".1%"),
    "nsp_accuracy": ("next-sentence accuracy", ".1%"),
    "tokens_per_sec": ("tokens/s", ",.0f"),
}


def examples(checkpoint: Path, dataset, n: int = 6) -> None:
    """Fill one word in each of a few validation sentences, of a causal model the last; its guess beside the truth."""
    from .fill_mask import FillMask

    fill = FillMask(checkpoint)
    table = Table(title="what it learned: [MASK] in sentences it has not seen", title_justify="left")
    for column in ("sentence", "was", "guesses"):
        table.add_column(column)
    for ids, position in _sentences(dataset, n):
        truth = fill.tokenizer.tokens[ids[position]]
        words = [fill.tokenizer.tokens[i] for i in ids]
        guesses = fill.at(ids, position, top=4)
        words[position:] = ["[MASK]", *([] if fill.causal else words[position + 1 :])]
        text = " ".join(words).replace(" ##", "")
        table.add_row(*map(Text, (text, truth, ", ".join(f"{token} {p:.0%}" for token, p in guesses))))
    console.print(table)


def _sentences(dataset, n: int):
    """(ids, position) of `n` validation sentences of 8 to 24 tokens, and a whole word within each."""
    found = 0
    for document in dataset.document_ids:
        for i in range(dataset.documents[document], dataset.documents[document + 1]):
            ids = dataset.tokens[dataset.sentences[i] : dataset.sentences[i + 1]].tolist()
            tokens = [dataset.tokenizer.tokens[t] for t in ids]
            whole = [j for j in range(2, len(ids) - 1) if tokens[j].isalpha() and len(tokens[j]) > 2
                     and not tokens[j + 1].startswith("##")]
            if 8 <= len(ids) <= 24 and whole:
                yield ids, whole[len(whole) // 2]
                found += 1
                break  # one a document
        if found == n:
            return
